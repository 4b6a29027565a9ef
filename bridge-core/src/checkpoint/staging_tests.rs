use super::*;

fn names(dir: &Path) -> Vec<String> {
    let mut names: Vec<_> = fs::read_dir(dir)
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort();
    names
}

fn fill(staging: &Staging, text: &str) {
    write_file(
        &staging.dir().join("config.json"),
        text.as_bytes(),
        Durability::Cached,
    )
    .unwrap();
}

#[test]
fn a_folder_appears_whole_or_not_at_all() {
    let root = tempfile::tempdir().unwrap();
    let target = root.path().join("a/b/out");
    let staging = Staging::create(&target, Existing::Refuse).unwrap();
    fill(&staging, "1");
    assert!(!target.exists());
    drop(staging);
    assert_eq!(
        names(root.path()),
        [""; 0],
        "folders made on the way are gone too"
    );

    for durability in [Durability::Cached, Durability::Synced] {
        let target = root.path().join(format!("{durability:?}"));
        let staging = Staging::create(&target, Existing::Refuse).unwrap();
        fill(&staging, "1");
        assert_eq!(
            staging.publish(durability).unwrap().file_name(),
            target.file_name()
        );
        assert_eq!(names(&target), ["config.json"]);
    }
    assert_eq!(names(root.path()), ["Cached", "Synced"]);
}

#[test]
fn what_stands_there_is_kept_or_exchanged() {
    let root = tempfile::tempdir().unwrap();
    let target = root.path().join("out");
    // An empty folder is as good as none.
    fs::create_dir(&target).unwrap();
    let staging = Staging::create(&target, Existing::Refuse).unwrap();
    fill(&staging, "1");
    staging.publish(Durability::Cached).unwrap();

    let refused = Staging::create(&target, Existing::Refuse).unwrap_err();
    assert!(matches!(refused, CheckpointError::OutputExists { .. }));

    fs::write(target.join("old"), "").unwrap();
    let staging = Staging::create(&target, Existing::Replace).unwrap();
    fill(&staging, "2");
    staging.publish(Durability::Cached).unwrap();
    assert_eq!(names(&target), ["config.json"]);
    assert_eq!(fs::read_to_string(target.join("config.json")).unwrap(), "2");
    assert_eq!(names(root.path()), ["out"]);
}

#[test]
fn folders_of_other_things_are_never_replaced() {
    let root = tempfile::tempdir().unwrap();
    let target = root.path().join("documents");
    fs::create_dir(&target).unwrap();
    fs::write(target.join("thesis.txt"), "").unwrap();
    let refused = Staging::create(&target, Existing::Replace).unwrap_err();
    assert!(matches!(refused, CheckpointError::NotReplaceable { .. }));
    let refused = Staging::create(&target.join("thesis.txt"), Existing::Replace).unwrap_err();
    assert!(
        matches!(refused, CheckpointError::NotAFolder { .. }),
        "{refused:?}"
    );
    let refused = Staging::create(Path::new("/"), Existing::Replace).unwrap_err();
    assert!(
        matches!(
            refused,
            CheckpointError::NotReplaceable { .. } | CheckpointError::BadLayout { .. }
        ),
        "{refused:?}"
    );
    assert_eq!(names(root.path()), ["documents"]);
}

/// Someone else fills the target while the writer works: theirs is not overwritten.
#[test]
fn a_target_filled_meanwhile_is_respected() {
    let root = tempfile::tempdir().unwrap();
    let target = root.path().join("out");
    let staging = Staging::create(&target, Existing::Refuse).unwrap();
    fs::create_dir(&target).unwrap();
    fs::write(target.join("theirs"), "").unwrap();
    assert!(matches!(
        staging.publish(Durability::Cached),
        Err(CheckpointError::OutputExists { .. })
    ));
    assert_eq!(names(root.path()), ["out"]);
    assert_eq!(names(&target), ["theirs"]);
}

#[cfg(unix)]
#[test]
fn a_link_to_a_folder_stays_a_link() {
    let root = tempfile::tempdir().unwrap();
    fs::create_dir(root.path().join("real")).unwrap();
    std::os::unix::fs::symlink("real", root.path().join("link")).unwrap();
    let staging = Staging::create(&root.path().join("link"), Existing::Refuse).unwrap();
    fill(&staging, "1");
    staging.publish(Durability::Cached).unwrap();
    assert!(root.path().join("link").is_symlink());
    assert_eq!(names(&root.path().join("real")), ["config.json"]);
}

/// A process id that belongs to no process: that of a child that has been waited for.
fn dead_pid() -> u32 {
    let mut child = std::process::Command::new("true").spawn().unwrap();
    child.wait().unwrap();
    child.id()
}

#[test]
fn leftovers_of_the_dead_are_removed_and_those_of_the_living_kept() {
    let root = tempfile::tempdir().unwrap();
    let (dead, alive, here) = (dead_pid(), std::process::id(), machine_mark());
    let elsewhere = here.wrapping_add(1);
    let leftover = |pid: u32, machine: u32| format!(".out{PARTIAL}{pid}-{machine:08x}00000001");
    let kept = [
        leftover(alive, here),
        // A writer on another machine cannot be asked; it gets a day.
        leftover(dead, elsewhere),
        format!(".other{PARTIAL}{dead}-{here:08x}00000001"),
        ".out.partial-mine".to_owned(),
        format!("out{PARTIAL}{dead}-{here:08x}00000001"),
    ];
    let removed = [
        leftover(dead, here),
        format!(".out{REMOVED}{dead}-{here:08x}00000002"),
    ];
    for name in kept.iter().chain(&removed) {
        fs::create_dir(root.path().join(name)).unwrap();
        fs::write(root.path().join(name).join("model.safetensors"), "x").unwrap();
    }
    let old = root.path().join(leftover(dead, elsewhere.wrapping_add(1)));
    fs::create_dir(&old).unwrap();
    let two_days_ago = SystemTime::now() - 2 * ABANDONED_AFTER;
    File::open(&old)
        .unwrap()
        .set_modified(two_days_ago)
        .unwrap();

    let staging = Staging::create(&root.path().join("out"), Existing::Refuse).unwrap();
    fill(&staging, "1");
    staging.publish(Durability::Cached).unwrap();
    let mut expected: Vec<String> = kept.to_vec();
    expected.push("out".to_owned());
    expected.sort();
    assert_eq!(names(root.path()), expected);
}

#[test]
fn a_full_disk_is_known_beforehand() {
    let root = tempfile::tempdir().unwrap();
    let staging = Staging::create(&root.path().join("out"), Existing::Refuse).unwrap();
    let error = staging.check_room(1 << 60).unwrap_err();
    assert!(
        matches!(
            &error,
            CheckpointError::DiskFull {
                available: Some(_),
                ..
            }
        ),
        "{error:?}"
    );
    assert!(error.to_string().contains("free some space"), "{error}");
    staging.check_room(1).unwrap();
    drop(staging);
    assert_eq!(names(root.path()), [""; 0]);
}

#[test]
fn small_files_are_replaced_whole() {
    let root = tempfile::tempdir().unwrap();
    let path = root.path().join("latest");
    for (text, durability) in [("one", Durability::Cached), ("two", Durability::Synced)] {
        replace_file(&path, text.as_bytes(), durability).unwrap();
        assert_eq!(fs::read_to_string(&path).unwrap(), text);
    }
    assert_eq!(names(root.path()), ["latest"]);
    fs::create_dir(root.path().join("folder")).unwrap();
    assert!(replace_file(&root.path().join("folder"), b"x", Durability::Cached).is_err());
    assert_eq!(names(root.path()), ["folder", "latest"]);
}
