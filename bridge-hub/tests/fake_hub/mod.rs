//! A hub on loopback: a few repositories, and the ways in which a real one refuses or breaks off.

use std::collections::HashMap;
use std::io::{BufRead, BufReader, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::{self, JoinHandle};

use sha1::Digest as _;

/// The commit that `main` points to.
pub(crate) const COMMIT: &str = "0123456789abcdef0123456789abcdef01234567";

/// How the hub treats one file.
#[derive(Clone, Default)]
pub(crate) struct Served {
    pub(crate) content: Vec<u8>,
    /// Listed by its sha256, as large files are; else by its git sha1.
    pub(crate) lfs: bool,
    /// Cut the connection after this many bytes of each reply, this many times.
    pub(crate) cut: Option<(usize, usize)>,
    /// Ignore `Range` and always send everything.
    pub(crate) no_ranges: bool,
    /// Send these bytes in place of `content`.
    pub(crate) sent: Option<Vec<u8>>,
    /// Listed, but 404 when asked for.
    pub(crate) gone: bool,
}

/// One request as it arrived.
#[derive(Clone, Debug)]
pub(crate) struct Request {
    pub(crate) path: String,
    pub(crate) headers: HashMap<String, String>,
}

#[derive(Default)]
struct State {
    files: Vec<(String, Served)>,
    gated: bool,
    requests: Vec<Request>,
    /// Replaces the listing's body.
    listing: Option<String>,
}

/// The running server; stops when dropped.
pub(crate) struct FakeHub {
    pub(crate) endpoint: String,
    state: Arc<Mutex<State>>,
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl FakeHub {
    /// Serves `org/name` with these files.
    pub(crate) fn start(files: Vec<(String, Served)>) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a loopback port");
        let endpoint = format!("http://{}", listener.local_addr().expect("its address"));
        let state = Arc::new(Mutex::new(State {
            files,
            ..State::default()
        }));
        let stop = Arc::new(AtomicBool::new(false));
        let (shared, stopping) = (Arc::clone(&state), Arc::clone(&stop));
        let thread = thread::spawn(move || {
            for stream in listener.incoming() {
                if stopping.load(Ordering::SeqCst) {
                    break;
                }
                // A client that goes away in the middle of a reply is part of some tests.
                let _ = stream.and_then(|s| answer(s, &shared));
            }
        });
        Self {
            endpoint,
            state,
            stop,
            thread: Some(thread),
        }
    }

    pub(crate) fn set_gated(&self) {
        self.state.lock().expect("state").gated = true;
    }

    pub(crate) fn set_listing(&self, body: String) {
        self.state.lock().expect("state").listing = Some(body);
    }

    /// Changes how one file is served from now on.
    pub(crate) fn serve(&self, name: &str, change: impl FnOnce(&mut Served)) {
        let mut state = self.state.lock().expect("state");
        change(
            &mut state
                .files
                .iter_mut()
                .find(|(n, _)| n == name)
                .expect("a served file")
                .1,
        );
    }

    /// Requests so far whose path ends in `suffix`.
    pub(crate) fn requests(&self, suffix: &str) -> Vec<Request> {
        let state = self.state.lock().expect("state");
        state
            .requests
            .iter()
            .filter(|r| r.path.ends_with(suffix))
            .cloned()
            .collect()
    }
}

impl Drop for FakeHub {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::SeqCst);
        // Wakes the thread from `accept`.
        let _ = TcpStream::connect(self.endpoint.trim_start_matches("http://"));
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

fn answer(stream: TcpStream, state: &Mutex<State>) -> std::io::Result<()> {
    let mut lines = BufReader::new(stream.try_clone()?).lines();
    let first = lines.next().transpose()?.unwrap_or_default();
    let path = first.split(' ').nth(1).unwrap_or_default().to_owned();
    let mut headers = HashMap::new();
    for line in lines {
        let line = line?;
        let Some((name, value)) = line.split_once(':') else {
            break;
        };
        headers.insert(name.to_ascii_lowercase(), value.trim().to_owned());
    }
    let mut state = state.lock().expect("state");
    state.requests.push(Request {
        path: path.clone(),
        headers: headers.clone(),
    });
    let mut reply = Reply { stream };
    if let Some(revision) = path.strip_prefix("/api/models/org/name/revision/") {
        let revision = revision.trim_end_matches("?blobs=true");
        if revision != "main" && revision != COMMIT {
            return reply.refuse(404, "RevisionNotFound");
        }
        let body = state
            .listing
            .clone()
            .unwrap_or_else(|| listing(&state.files));
        return reply.send(
            200,
            &[("Content-Type", "application/json".into())],
            body.as_bytes(),
        );
    }
    let Some(name) = path.strip_prefix(&format!("/org/name/resolve/{COMMIT}/")) else {
        // What the hub tells a visitor without a token about a repository that does not exist.
        return reply.refuse(401, "RepoNotFound");
    };
    if state.gated && name != "config.json" {
        return reply.refuse(403, "GatedRepo");
    }
    let Some((_, file)) = state.files.iter_mut().find(|(n, f)| n == name && !f.gone) else {
        return reply.refuse(404, "EntryNotFound");
    };
    let bytes = file.sent.clone().unwrap_or_else(|| file.content.clone());
    let start = headers
        .get("range")
        .filter(|_| !file.no_ranges)
        .and_then(|r| r.strip_prefix("bytes=")?.strip_suffix('-')?.parse().ok());
    let cut = match &mut file.cut {
        Some((at, times)) if *times > 0 => {
            *times -= 1;
            Some(*at)
        }
        _ => None,
    };
    match start {
        Some(start) if start >= bytes.len() => reply.send(416, &[], b""),
        Some(start) => {
            let range = format!("bytes {start}-{}/{}", bytes.len() - 1, bytes.len());
            reply.send_cut(206, &[("Content-Range", range)], &bytes[start..], cut)
        }
        None => reply.send_cut(200, &[], &bytes, cut),
    }
}

fn listing(files: &[(String, Served)]) -> String {
    let siblings: Vec<_> = files
        .iter()
        .map(|(name, file)| {
            let hex = |bytes: &[u8]| bytes.iter().map(|b| format!("{b:02x}")).collect::<String>();
            let mut entry = serde_json::json!({"rfilename": name, "size": file.content.len()});
            if file.lfs {
                entry["blobId"] = "f".repeat(40).into();
                entry["lfs"] = serde_json::json!({
                    "sha256": hex(&sha2::Sha256::digest(&file.content)), "size": file.content.len(), "pointerSize": 134
                });
            } else {
                let blob = [format!("blob {}\0", file.content.len()).into_bytes(), file.content.clone()].concat();
                entry["blobId"] = hex(&sha1::Sha1::digest(blob)).into();
            }
            entry
        })
        .collect();
    serde_json::json!({"id": "org/name", "sha": COMMIT, "siblings": siblings}).to_string()
}

struct Reply {
    stream: TcpStream,
}

impl Reply {
    fn refuse(&mut self, status: u16, code: &str) -> std::io::Result<()> {
        self.send(
            status,
            &[
                ("X-Error-Code", code.into()),
                ("X-Error-Message", "no".into()),
            ],
            b"no",
        )
    }

    fn send(
        &mut self,
        status: u16,
        headers: &[(&str, String)],
        body: &[u8],
    ) -> std::io::Result<()> {
        self.send_cut(status, headers, body, None)
    }

    fn send_cut(
        &mut self,
        status: u16,
        headers: &[(&str, String)],
        body: &[u8],
        cut: Option<usize>,
    ) -> std::io::Result<()> {
        let mut head = format!(
            "HTTP/1.1 {status} X\r\nContent-Length: {}\r\nConnection: close\r\n",
            body.len()
        );
        for (name, value) in headers {
            head.push_str(&format!("{name}: {value}\r\n"));
        }
        self.stream.write_all(format!("{head}\r\n").as_bytes())?;
        self.stream
            .write_all(&body[..cut.unwrap_or(body.len()).min(body.len())])
    }
}
