//! Fetching from a hub on loopback: the ordinary way, and every way in which it can go wrong.

mod fake_hub;

use std::fs;
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use bridge_hub::{Error, Event, HubOptions, resolve};
use fake_hub::{COMMIT, FakeHub, Served};

/// Larger than one chunk of the transfer, and no multiple of it.
fn weights() -> Vec<u8> {
    (0..700_001u32)
        .map(|i| (i.wrapping_mul(2_654_435_761) >> 24) as u8)
        .collect()
}

fn file(name: &str, content: impl Into<Vec<u8>>) -> (String, Served) {
    (
        name.to_owned(),
        Served {
            content: content.into(),
            ..Served::default()
        },
    )
}

fn model() -> Vec<(String, Served)> {
    let mut shard = file("model.safetensors", weights());
    shard.1.lfs = true;
    vec![
        file("config.json", "{}"),
        file("tokenizer.json", "{\"t\": 1}"),
        file("README.md", "not needed"),
        file("pytorch_model.bin", "never"),
        shard,
    ]
}

fn options(endpoint: &str, cache: &Path) -> HubOptions {
    let mut options = HubOptions::from_vars(|_| None).expect("settings");
    options.endpoint = endpoint.to_owned();
    options.cache_dir = cache.to_owned();
    options.retry_wait = Duration::from_millis(1);
    options.timeout = Duration::from_secs(10);
    options
}

struct Fixture {
    hub: FakeHub,
    cache: tempfile::TempDir,
}

impl Fixture {
    fn new(files: Vec<(String, Served)>) -> Self {
        Self {
            hub: FakeHub::start(files),
            cache: tempfile::tempdir().expect("a temporary folder"),
        }
    }

    fn options(&self) -> HubOptions {
        options(&self.hub.endpoint, self.cache.path())
    }

    fn resolve(&self, source: &str) -> Result<PathBuf, Error> {
        resolve(source, &self.options())
    }

    #[track_caller]
    fn fails(&self, source: &str, words: &[&str]) -> Error {
        let error = self.resolve(source).expect_err(source);
        let text = error.to_string();
        for word in words {
            assert!(text.contains(word), "{word:?} is not in: {text}");
        }
        error
    }

    /// Files under the cache, relative to it.
    fn cached(&self) -> Vec<String> {
        fn walk(dir: &Path, root: &Path, found: &mut Vec<String>) {
            for entry in fs::read_dir(dir).into_iter().flatten().flatten() {
                let path = entry.path();
                if path.is_dir() {
                    walk(&path, root, found);
                } else {
                    found.push(
                        path.strip_prefix(root)
                            .expect("below the root")
                            .to_string_lossy()
                            .into_owned(),
                    );
                }
            }
        }
        let mut found = Vec::new();
        walk(self.cache.path(), self.cache.path(), &mut found);
        found.sort();
        found
    }
}

#[test]
fn a_model_is_fetched_once_into_the_shared_cache_layout() {
    let f = Fixture::new(model());
    let folder = f.resolve("org/name").expect("fetched");
    assert_eq!(
        folder,
        f.cache
            .path()
            .join("models--org--name/snapshots")
            .join(COMMIT)
    );
    assert_eq!(
        fs::read(folder.join("model.safetensors")).expect("weights"),
        weights()
    );
    assert_eq!(
        fs::read_to_string(folder.join("config.json")).expect("config"),
        "{}"
    );
    let mut names: Vec<_> = fs::read_dir(&folder)
        .expect("snapshot")
        .flatten()
        .map(|e| e.file_name())
        .collect();
    names.sort();
    assert_eq!(
        names,
        ["config.json", "model.safetensors", "tokenizer.json"]
    );
    let target =
        fs::read_link(folder.join("config.json")).expect("a link, as the Python tools make");
    assert!(target.starts_with("../../blobs"), "{}", target.display());
    assert_eq!(
        fs::read_to_string(f.cache.path().join("models--org--name/refs/main")).expect("ref"),
        COMMIT
    );

    f.resolve("org/name@main").expect("again");
    assert_eq!(
        f.hub.requests("model.safetensors").len(),
        1,
        "the second time nothing is fetched"
    );
}

#[test]
fn a_broken_download_resumes_within_one_run() {
    let f = Fixture::new(model());
    f.hub
        .serve("model.safetensors", |s| s.cut = Some((200_000, 2)));
    let folder = f.resolve("org/name").expect("fetched in three pieces");
    assert_eq!(
        fs::read(folder.join("model.safetensors")).expect("weights"),
        weights()
    );
    let ranges: Vec<_> = f
        .hub
        .requests("model.safetensors")
        .iter()
        .map(|r| r.headers.get("range").cloned().unwrap_or_default())
        .collect();
    assert_eq!(ranges, ["", "bytes=200000-", "bytes=400000-"]);
}

#[test]
fn a_broken_download_resumes_in_a_later_run() {
    let f = Fixture::new(model());
    f.hub
        .serve("model.safetensors", |s| s.cut = Some((100_000, 1)));
    let mut once = f.options();
    once.attempts = 1;
    let error = resolve("org/name", &once).expect_err("cut off").to_string();
    assert!(
        error.contains("broke off at byte 100000 of 700001") && error.contains("again to resume"),
        "{error}"
    );
    assert!(f.cached().iter().any(|n| n.ends_with(".incomplete")));
    assert!(
        !f.cached().iter().any(|n| n.contains("refs/")),
        "an incomplete snapshot is not announced"
    );

    let events = Arc::new(Mutex::new(Vec::new()));
    let seen = Arc::clone(&events);
    let mut again = f.options();
    again.progress = Some(Arc::new(move |e: &Event| {
        seen.lock().expect("events").push(e.clone())
    }));
    let folder = resolve("org/name", &again).expect("completed");
    assert_eq!(
        fs::read(folder.join("model.safetensors")).expect("weights"),
        weights()
    );
    assert_eq!(
        f.hub.requests("model.safetensors")[1].headers["range"],
        "bytes=100000-"
    );
    assert!(!f.cached().iter().any(|n| n.ends_with(".incomplete")));

    let events = events.lock().expect("events");
    let first = events
        .iter()
        .find(|e| matches!(e, Event::Progress { file, .. } if file == "model.safetensors"));
    assert_eq!(
        first,
        Some(&Event::Progress {
            file: "model.safetensors".into(),
            done: 100_000,
            total: 700_001
        })
    );
    assert!(events.contains(&Event::Done {
        file: "config.json".into(),
        cached: true
    }));
    assert!(events.contains(&Event::Done {
        file: "model.safetensors".into(),
        cached: false
    }));
}

#[test]
fn a_server_without_ranges_is_asked_for_everything_again() {
    let f = Fixture::new(model());
    f.hub.serve("model.safetensors", |s| {
        s.cut = Some((300_000, 1));
        s.no_ranges = true;
    });
    let folder = f.resolve("org/name").expect("fetched");
    assert_eq!(
        fs::read(folder.join("model.safetensors")).expect("weights"),
        weights()
    );
}

#[test]
fn a_damaged_part_of_an_earlier_run_is_dropped() {
    let f = Fixture::new(model());
    f.hub
        .serve("model.safetensors", |s| s.cut = Some((100_000, 1)));
    let mut once = f.options();
    once.attempts = 1;
    resolve("org/name", &once).expect_err("cut off");
    let part = f
        .cached()
        .into_iter()
        .find(|n| n.ends_with(".incomplete"))
        .expect("a part");
    fs::write(f.cache.path().join(part), vec![7; 100_000]).expect("damaged");
    let folder = f.resolve("org/name").expect("fetched from the start");
    assert_eq!(
        fs::read(folder.join("model.safetensors")).expect("weights"),
        weights()
    );
}

#[test]
fn wrong_bytes_and_wrong_sizes_are_not_kept() {
    let f = Fixture::new(model());
    let mut wrong = weights();
    wrong[5] ^= 1;
    f.hub.serve("model.safetensors", |s| s.sent = Some(wrong));
    let error = f.fails("org/name", &["model.safetensors", "sha256", "deleted"]);
    assert!(matches!(error, Error::Digest { .. }) && !error.is_input());
    f.hub.serve("model.safetensors", |s| {
        s.sent = Some([weights(), vec![1]].concat())
    });
    f.fails("org/name", &["model.safetensors", "700001"]);
    f.hub.serve("model.safetensors", |s| s.sent = None);
    f.hub
        .serve("config.json", |s| s.sent = Some(b"[]".to_vec()));
    let fresh = Fixture {
        hub: f.hub,
        cache: tempfile::tempdir().expect("a temporary folder"),
    };
    fresh.fails("org/name", &["config.json", "git sha1"]);
}

#[test]
fn a_missing_file_is_named() {
    let f = Fixture::new(model());
    f.hub.serve("tokenizer.json", |s| s.gone = true);
    f.fails("org/name", &["tokenizer.json", "org/name@main"]);

    let no_config = Fixture::new(vec![file("model.safetensors", "x")]);
    assert!(no_config.fails("org/name", &["config.json"]).is_input());

    let no_weights = Fixture::new(vec![
        file("config.json", "{}"),
        file("pytorch_model.bin", "x"),
    ]);
    no_weights.fails("org/name", &["no safetensors weights", "pytorch_model.bin"]);

    let index = r#"{"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}"#;
    let no_shard = Fixture::new(vec![
        file("config.json", "{}"),
        file("model.safetensors.index.json", index),
        file("model-00001-of-00002.safetensors", "x"),
    ]);
    no_shard.fails(
        "org/name",
        &["model-00002-of-00002.safetensors", "names as a shard"],
    );
    assert!(
        no_shard
            .hub
            .requests("model-00001-of-00002.safetensors")
            .is_empty(),
        "refused before weights are fetched"
    );
}

#[test]
fn a_gated_repository_says_what_to_do() {
    let f = Fixture::new(model());
    f.hub.set_gated();
    let error = f.fails(
        "org/name",
        &["gated", "accept its licence", "/org/name", "set HF_TOKEN"],
    );
    assert!(error.is_input());
    let mut with_token = f.options();
    with_token.token = Some("hf_secret".into());
    let text = resolve("org/name", &with_token)
        .expect_err("still gated")
        .to_string();
    assert!(
        text.contains("HF_TOKEN belongs to the account") && !text.contains("hf_secret"),
        "{text}"
    );
    assert_eq!(
        f.hub.requests("?blobs=true")[1].headers["authorization"],
        "Bearer hf_secret"
    );
}

#[test]
fn unknown_repositories_and_revisions_are_told_apart() {
    let f = Fixture::new(model());
    assert!(
        f.fails(
            "org/other",
            &["org/other", "check the spelling", "HF_TOKEN"]
        )
        .is_input()
    );
    assert!(
        f.fails(
            "org/name@v9",
            &["no revision `v9`", "branch, a tag or a commit"]
        )
        .is_input()
    );
    f.resolve(&format!("org/name@{COMMIT}"))
        .expect("a commit hash is a revision");
    assert!(
        !f.cached().iter().any(|n| n.contains("refs/")),
        "a commit needs no ref"
    );
}

#[test]
fn hostile_names_in_the_listing_are_refused() {
    for name in ["../x", "/etc/cron.d/x", "a/../../../x", "model\\..\\x"] {
        let f = Fixture::new(model());
        f.hub.set_listing(
            serde_json::json!({"sha": COMMIT, "siblings": [
                {"rfilename": "config.json", "size": 2, "blobId": "9e26dfeeb6e641a33dae4961196235bdb965b21b"},
                {"rfilename": name, "size": 2, "blobId": "9e26dfeeb6e641a33dae4961196235bdb965b21b"}]})
            .to_string(),
        );
        let error = f.fails("org/name", &["nothing was fetched"]);
        assert!(matches!(error, Error::HostileName { .. }), "{error}");
        assert!(f.cached().is_empty(), "{:?}", f.cached());
    }
    let f = Fixture::new(vec![
        file("config.json", "{}"),
        file(
            "model.safetensors.index.json",
            r#"{"weight_map": {"a": "../../../escape.safetensors"}}"#,
        ),
    ]);
    f.fails("org/name", &["escape.safetensors", "would leave"]);
}

#[test]
fn an_unreachable_hub_is_an_error_unless_the_cache_is_complete() {
    let closed = {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
        format!("http://{}", listener.local_addr().expect("its address"))
    };
    let f = Fixture::new(model());
    let error = resolve("org/name", &options(&closed, f.cache.path())).expect_err("nobody listens");
    let text = error.to_string();
    assert!(
        matches!(error, Error::Unreachable { .. }) && !error.is_input(),
        "{text}"
    );
    assert!(
        text.contains(&closed) && text.contains("HF_ENDPOINT"),
        "{text}"
    );

    let folder = f.resolve("org/name").expect("fetched");
    let notices = Arc::new(Mutex::new(Vec::new()));
    let seen = Arc::clone(&notices);
    let mut unreachable = options(&closed, f.cache.path());
    unreachable.progress = Some(Arc::new(move |e: &Event| {
        seen.lock().expect("events").push(e.clone())
    }));
    assert_eq!(
        resolve("org/name", &unreachable).expect("from the cache"),
        folder
    );
    assert!(
        matches!(&notices.lock().expect("events")[..], [Event::Notice(n)] if n.contains("using the copy"))
    );
}

#[test]
fn offline_uses_the_cache_or_says_what_is_missing() {
    let f = Fixture::new(model());
    let mut offline = f.options();
    offline.offline = true;
    let error = resolve("org/name", &offline).expect_err("nothing is cached");
    assert!(
        error.is_input() && error.to_string().contains("HF_HUB_OFFLINE"),
        "{error}"
    );
    assert!(f.hub.requests("").is_empty(), "no connection was opened");

    let folder = f.resolve("org/name").expect("fetched");
    assert_eq!(
        resolve("org/name", &offline).expect("from the cache"),
        folder
    );
    fs::remove_file(folder.join("model.safetensors")).expect("removed");
    let error = resolve("org/name", &offline)
        .expect_err("incomplete")
        .to_string();
    assert!(error.contains("model.safetensors is missing"), "{error}");
}

#[test]
fn a_cache_that_cannot_be_written_is_an_error() {
    let f = Fixture::new(model());
    let blocked = f.cache.path().join("file");
    fs::write(&blocked, "in the way").expect("a file");
    let error = resolve("org/name", &options(&f.hub.endpoint, &blocked)).expect_err("not a folder");
    assert!(
        matches!(error, Error::Io { .. }) && error.to_string().contains("file"),
        "{error}"
    );
}
