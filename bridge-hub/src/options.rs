//! How to reach the hub and where to keep what it sends.

use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use crate::error::{Error, Result};

/// What happens during a fetch, for a progress display.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Event {
    /// The listing is in: this many files will be looked at, with this many bytes together.
    Plan {
        /// Files selected.
        files: usize,
        /// Their sizes added up.
        bytes: u64,
    },
    /// `done` of `total` bytes of `file` are in the cache. Sent often; the first one tells where a broken download resumes.
    Progress {
        /// Name in the repository.
        file: String,
        /// Bytes kept so far.
        done: u64,
        /// Size of the file.
        total: u64,
    },
    /// The file is complete and its digest is right, or it was in the cache already.
    Done {
        /// Name in the repository.
        file: String,
        /// Whether nothing had to be fetched.
        cached: bool,
    },
    /// Something the user should read.
    Notice(String),
}

/// Receives [`Event`]s.
pub type ProgressFn = Arc<dyn Fn(&Event) + Send + Sync>;

/// Settings of a fetch. [`HubOptions::from_vars`] reads them the way the Python tools do.
#[derive(Clone)]
pub struct HubOptions {
    /// Address of the hub, without a trailing slash.
    pub endpoint: String,
    /// Access token, sent to the endpoint's host only.
    pub token: Option<String>,
    /// The cache folder that holds `models--org--name`.
    pub cache_dir: PathBuf,
    /// Use what is cached and open no connection.
    pub offline: bool,
    /// Attempts in a row without a new byte before a download is given up.
    pub attempts: u32,
    /// Wait before the second attempt; doubles with each further one.
    pub retry_wait: Duration,
    /// Limit on opening a connection, and on the wait for the start of a reply and for each further piece of it.
    pub timeout: Duration,
    /// A PEM file of certificate authorities to trust instead of the built-in ones.
    pub root_certificates: Option<PathBuf>,
    /// Where events go.
    pub progress: Option<ProgressFn>,
}

impl fmt::Debug for HubOptions {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // The token stays out of logs.
        f.debug_struct("HubOptions")
            .field("endpoint", &self.endpoint)
            .field("token", &self.token.as_ref().map(|_| "..."))
            .field("cache_dir", &self.cache_dir)
            .field("offline", &self.offline)
            .finish_non_exhaustive()
    }
}

impl HubOptions {
    /// Settings from variables that `var` looks up (pass `|name| std::env::var(name).ok()`): `HF_ENDPOINT`, `HF_TOKEN` or
    /// the token file of `HF_TOKEN_PATH` or `HF_HOME/token`, `HF_HUB_CACHE`, `HF_HOME`, `XDG_CACHE_HOME`, `HOME`,
    /// `HF_HUB_OFFLINE`, and `SSL_CERT_FILE`.
    ///
    /// # Errors
    /// An endpoint that is no http address.
    pub fn from_vars(var: impl Fn(&str) -> Option<String>) -> Result<Self> {
        let set = |name: &str| {
            var(name)
                .map(|v| v.trim().to_owned())
                .filter(|v| !v.is_empty())
        };
        let home = set("HF_HOME")
            .map(|v| expand(&v, set("HOME")))
            .unwrap_or_else(|| {
                let cache = set("XDG_CACHE_HOME").map(PathBuf::from);
                cache
                    .unwrap_or_else(|| {
                        Path::new(&set("HOME").unwrap_or_else(|| ".".into())).join(".cache")
                    })
                    .join("huggingface")
            });
        let endpoint = set("HF_ENDPOINT").unwrap_or_else(|| "https://huggingface.co".into());
        if !endpoint.starts_with("https://") && !endpoint.starts_with("http://") {
            return Err(Error::BadSetting {
                variable: "HF_ENDPOINT",
                value: endpoint,
                reason: "expected an address that starts with https:// or http://".into(),
            });
        }
        let token_file = set("HF_TOKEN_PATH")
            .map(PathBuf::from)
            .unwrap_or_else(|| home.join("token"));
        // No token file is the ordinary case, and an unreadable one leaves the user where no token would.
        let stored = || {
            std::fs::read_to_string(token_file)
                .ok()
                .map(|t| t.trim().to_owned())
                .filter(|t| !t.is_empty())
        };
        let offline = set("HF_HUB_OFFLINE").is_some_and(|v| {
            matches!(v.to_ascii_lowercase().as_str(), "1" | "true" | "yes" | "on")
        });
        Ok(Self {
            endpoint: endpoint.trim_end_matches('/').to_owned(),
            token: set("HF_TOKEN")
                .or_else(|| set("HUGGING_FACE_HUB_TOKEN"))
                .or_else(stored),
            cache_dir: set("HF_HUB_CACHE")
                .or_else(|| set("HUGGINGFACE_HUB_CACHE"))
                .map(|v| expand(&v, set("HOME")))
                .unwrap_or_else(|| home.join("hub")),
            offline,
            attempts: 5,
            retry_wait: Duration::from_secs(1),
            timeout: Duration::from_secs(30),
            root_certificates: set("SSL_CERT_FILE").map(PathBuf::from),
            progress: None,
        })
    }

    pub(crate) fn report(&self, event: Event) {
        if let Some(progress) = &self.progress {
            progress(&event);
        }
    }
}

/// `~/x` as the shell would have it, since variables set in service files are not expanded.
fn expand(path: &str, home: Option<String>) -> PathBuf {
    match (path.strip_prefix("~/"), home) {
        (Some(rest), Some(home)) => Path::new(&home).join(rest),
        _ => PathBuf::from(path),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn options(vars: &[(&str, &str)]) -> Result<HubOptions> {
        HubOptions::from_vars(|name| {
            vars.iter()
                .find(|(n, _)| *n == name)
                .map(|(_, v)| (*v).to_owned())
        })
    }

    #[test]
    fn cache_folder_follows_the_python_tools() {
        let cache = |vars: &[(&str, &str)]| options(vars).expect("settings").cache_dir;
        assert_eq!(
            cache(&[("HOME", "/h")]),
            Path::new("/h/.cache/huggingface/hub")
        );
        assert_eq!(
            cache(&[("HOME", "/h"), ("XDG_CACHE_HOME", "/x")]),
            Path::new("/x/huggingface/hub")
        );
        assert_eq!(
            cache(&[("HOME", "/h"), ("HF_HOME", "~/hf")]),
            Path::new("/h/hf/hub")
        );
        assert_eq!(
            cache(&[("HF_HOME", "/hf"), ("HF_HUB_CACHE", "/c")]),
            Path::new("/c")
        );
    }

    #[test]
    fn token_comes_from_the_variable_or_the_stored_file() {
        let home = tempfile::tempdir().expect("a temporary folder");
        let path = home.path().to_str().expect("utf-8");
        assert_eq!(options(&[("HF_HOME", path)]).expect("settings").token, None);
        std::fs::write(home.path().join("token"), "hf_stored\n").expect("token file");
        assert_eq!(
            options(&[("HF_HOME", path)])
                .expect("settings")
                .token
                .as_deref(),
            Some("hf_stored")
        );
        let both = options(&[("HF_HOME", path), ("HF_TOKEN", " hf_given ")]).expect("settings");
        assert_eq!(both.token.as_deref(), Some("hf_given"));
        assert!(
            !format!("{both:?}").contains("hf_given"),
            "tokens stay out of debug output"
        );
    }

    #[test]
    fn endpoint_must_be_an_address() {
        assert_eq!(
            options(&[("HF_ENDPOINT", "http://mirror/")])
                .expect("settings")
                .endpoint,
            "http://mirror"
        );
        let error = options(&[("HF_ENDPOINT", "mirror")])
            .expect_err("no scheme")
            .to_string();
        assert!(
            error.contains("HF_ENDPOINT") && error.contains("https://"),
            "{error}"
        );
        assert!(
            options(&[("HF_HUB_OFFLINE", "TRUE")])
                .expect("settings")
                .offline
        );
        assert!(
            !options(&[("HF_HUB_OFFLINE", "0")])
                .expect("settings")
                .offline
        );
    }
}
