//! Talking to the hub, and turning its refusals into errors that say what to do.

use std::fs;

use ureq::config::RedirectAuthHeaders;
use ureq::http::Response;
use ureq::tls::{PemItem, RootCerts, TlsConfig, parse_pem};
use ureq::{Agent, Body};

use crate::error::{Error, Result};
use crate::listing::{self, Listing, RemoteFile};
use crate::options::HubOptions;
use crate::source::RepoId;

/// Listings of the largest repositories stay far below this, in bytes.
const LISTING_LIMIT: u64 = 64 << 20;
/// How much of a refusal's body is read for its message, in bytes.
const MESSAGE_LIMIT: u64 = 4096;

pub(crate) struct Client<'a> {
    agent: Agent,
    options: &'a HubOptions,
}

impl<'a> Client<'a> {
    pub(crate) fn new(options: &'a HubOptions) -> Result<Self> {
        let mut tls = TlsConfig::builder();
        if let Some(path) = &options.root_certificates {
            let pem = fs::read(path)
                .map_err(Error::io("read the certificates of SSL_CERT_FILE", path))?;
            let certificates: Vec<_> = parse_pem(&pem)
                .filter_map(|item| match item {
                    Ok(PemItem::Certificate(certificate)) => Some(certificate),
                    _ => None,
                })
                .collect();
            if certificates.is_empty() {
                return Err(Error::BadSetting {
                    variable: "SSL_CERT_FILE",
                    value: path.display().to_string(),
                    reason: "expected a PEM file with at least one certificate".into(),
                });
            }
            tls = tls.root_certs(RootCerts::new_with_certs(&certificates));
        }
        let agent = Agent::config_builder()
            .tls_config(tls.build())
            .http_status_as_error(false)
            // Large files are served by another host, which must not see the token.
            .redirect_auth_headers(RedirectAuthHeaders::SameHost)
            .user_agent(concat!("bridge-hub/", env!("CARGO_PKG_VERSION")))
            .timeout_connect(Some(options.timeout))
            .timeout_recv_response(Some(options.timeout))
            .timeout_per_read(Some(options.timeout))
            .build()
            .new_agent();
        Ok(Self { agent, options })
    }

    /// Asks for the files of a repository, with sizes and digests.
    pub(crate) fn listing(&self, repo: &RepoId) -> Result<Listing> {
        let url = format!(
            "{}/api/{}?blobs=true",
            self.options.endpoint,
            repo.layout().api_url()
        );
        let mut reply = self.get(&url, None)?;
        if reply.status() != 200 {
            return Err(self.refusal(repo, None, &url, reply));
        }
        let body = reply
            .body_mut()
            .with_config()
            .limit(LISTING_LIMIT)
            .read_to_vec()
            .map_err(|e| self.unreachable(&e))?;
        listing::parse(&repo.name, &url, &body)
    }

    /// Asks for a file from byte `start` on. The reply is 200 (whole file), 206 (the rest) or 416 (nothing there).
    pub(crate) fn file(
        &self,
        repo: &RepoId,
        commit: &str,
        file: &RemoteFile,
        start: u64,
    ) -> Result<Response<Body>> {
        let url = format!(
            "{}/{}/resolve/{commit}/{}",
            self.options.endpoint,
            repo.name,
            percent_encoded(&file.name)
        );
        let reply = self.get(&url, Some(start))?;
        match reply.status().as_u16() {
            200 | 206 | 416 => Ok(reply),
            _ => Err(self.refusal(repo, Some(&file.name), &url, reply)),
        }
    }

    fn get(&self, url: &str, start: Option<u64>) -> Result<Response<Body>> {
        let mut request = self.agent.get(url);
        if let Some(token) = &self.options.token {
            request = request.header("Authorization", format!("Bearer {token}"));
        }
        if let Some(start) = start {
            // Sizes and ranges count stored bytes, so nothing may be compressed on the way.
            request = request.header("Accept-Encoding", "identity");
            if start > 0 {
                request = request.header("Range", format!("bytes={start}-"));
            }
        }
        request.call().map_err(|e| self.unreachable(&e))
    }

    fn unreachable(&self, error: &ureq::Error) -> Error {
        Error::Unreachable {
            endpoint: self.options.endpoint.clone(),
            reason: error.to_string(),
        }
    }

    /// The hub's own code for the refusal decides; the status alone is ambiguous (a repository that does not exist is 401
    /// to a visitor without a token, so that private names cannot be guessed).
    fn refusal(
        &self,
        repo: &RepoId,
        file: Option<&str>,
        url: &str,
        mut reply: Response<Body>,
    ) -> Error {
        let header = |name: &str| {
            reply
                .headers()
                .get(name)
                .and_then(|v| v.to_str().ok())
                .map(str::to_owned)
        };
        let code = header("x-error-code").unwrap_or_default();
        let words = header("x-error-message");
        let status = reply.status().as_u16();
        let endpoint = self.options.endpoint.clone();
        let has_token = self.options.token.is_some();
        match (code.as_str(), status, file) {
            ("GatedRepo", _, _) => Error::Gated {
                repo: repo.name.clone(),
                page: format!("{endpoint}/{}", repo.name),
                has_token,
            },
            ("RevisionNotFound", _, _) => Error::RevisionNotFound {
                repo: repo.name.clone(),
                revision: repo.revision.clone(),
                endpoint,
            },
            ("EntryNotFound", _, Some(file)) | ("", 404, Some(file)) => Error::FileMissing {
                repo: repo.to_string(),
                file: file.to_owned(),
                needed_by: "its listing names".into(),
            },
            ("RepoNotFound", _, _) | ("", 401 | 404, None) => Error::RepoNotFound {
                repo: repo.name.clone(),
                endpoint,
                has_token,
            },
            _ => {
                // The reason phrase is a courtesy; a body that cannot be read leaves the status to speak for itself.
                let body = || {
                    reply
                        .body_mut()
                        .with_config()
                        .limit(MESSAGE_LIMIT)
                        .read_to_string()
                        .unwrap_or_default()
                };
                let message = words.unwrap_or_else(body);
                let message = message
                    .lines()
                    .next()
                    .unwrap_or_default()
                    .chars()
                    .take(200)
                    .collect();
                Error::Status {
                    url: url.to_owned(),
                    status,
                    message,
                }
            }
        }
    }
}

/// A checked file name as part of an address.
fn percent_encoded(name: &str) -> String {
    let mut encoded = String::with_capacity(name.len());
    for byte in name.bytes() {
        if byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_' | b'.' | b'~' | b'/') {
            encoded.push(char::from(byte));
        } else {
            encoded.push_str(&format!("%{byte:02X}"));
        }
    }
    encoded
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn odd_file_names_are_encoded() {
        assert_eq!(percent_encoded("a b/c?d#e.json"), "a%20b/c%3Fd%23e.json");
        assert_eq!(
            percent_encoded("model-00001-of-00002.safetensors"),
            "model-00001-of-00002.safetensors"
        );
        assert_eq!(percent_encoded("\u{e9}"), "%C3%A9");
    }
}
