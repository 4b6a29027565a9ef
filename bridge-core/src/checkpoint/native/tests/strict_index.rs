//! The index file against what it must not say.

use super::*;

/// An index with one tensor, given by its JSON.
fn index(tensor: &str) -> String {
    format!(
        r#"{{"format":"{FORMAT}","version":1,"iteration":1,"groups":{{"model":{{"w":{tensor}}},"optimizer":{{}}}}}}"#
    )
}

#[test]
fn indexes_are_strict() {
    #[track_caller]
    fn check(json: &str, part: &str) {
        let error = text(&NativeIndex::parse(json.as_bytes()).unwrap_err());
        assert!(error.contains(part), "{error}");
    }
    let good = r#"{"dtype":"F32","shape":[2],"pieces":[{"file":"model/a.safetensors","key":"w","offset":[0],"shape":[2]}]}"#;
    NativeIndex::parse(index(good).as_bytes()).unwrap();
    check("", "EOF");
    check("{}", "missing field `format`");
    check(
        &index(good).replace(FORMAT, "other"),
        "its format is `other`",
    );
    check(
        &index(good).replace("\"version\":1", "\"version\":2,\"new\":0"),
        "its version is 2, expected 1",
    );
    check(
        &index(good).replace("\"iteration\"", "\"iterations\""),
        "unknown field `iterations`",
    );
    check(
        &index(good).replace("{\"w\":", &format!("{{\"w\":{good},\"w\":")),
        "key `w` appears twice",
    );
    check(
        &index(&good.replace("\"key\"", "\"x\":1,\"key\"")),
        "unknown field `x`",
    );
    check(&index(&good.replace("F32", "F33")), "unknown dtype");
    check(&index(&good.replace("F32", "F4")), "packed types");
    for file in [
        "../a.safetensors",
        "model/../../a.safetensors",
        "/model/a.safetensors",
        "optimizer/a.safetensors",
        "modela.safetensors",
        "model/a.bin",
        "model/",
    ] {
        check(
            &index(&good.replace("model/a.safetensors", file)),
            "has a piece in",
        );
    }
    check(
        &index(&good.replace("[0]", "[1]")),
        "which is not within it",
    );
    check(
        &index(&good.replace("[0]", "[18446744073709551615]")),
        "which is not within it",
    );
    check(&index(&good.replace("[0]", "[]")), "which is not within it");
    check(
        &index(&good.replace("\"shape\":[2]}", "\"shape\":[1]}")),
        "do not hold each of its elements",
    );
    check(
        &index(r#"{"dtype":"F32","shape":[2],"pieces":[]}"#),
        "the 0 pieces",
    );
    check(
        &index(r#"{"dtype":"F32","shape":[4294967296,4294967296],"pieces":[]}"#),
        "larger than any file",
    );
    check(
        &index(good).replace("\"w\":{", "\"\":{"),
        "cannot name a tensor",
    );
    check(
        &index(good).replace("\"w\",", "\"a\\u0000\","),
        "cannot name a tensor",
    );
}
