//! Patterns of weight names.

/// Whether `name` matches `pattern`, in which each `*` stands for any text, dots included.
///
/// ```
/// use bridge_train::optimizer::name_matches;
///
/// assert!(name_matches("*norm.weight", "layers.3.input_norm.weight"));
/// assert!(name_matches("layers.*.bias", "layers.3.attention.q_proj.bias"));
/// assert!(!name_matches("*.bias", "lm_head.weight"));
/// ```
pub fn name_matches(pattern: &str, name: &str) -> bool {
    let Some((start, rest)) = pattern.split_once('*') else {
        return pattern == name;
    };
    let Some(mut left) = name.strip_prefix(start) else {
        return false;
    };
    let mut parts: Vec<&str> = rest.split('*').collect();
    let end = parts.pop().unwrap_or_default();
    // Taking each middle part at its first place leaves the most for those after it.
    for part in parts {
        match left.find(part) {
            Some(at) => left = &left[at + part.len()..],
            None => return false,
        }
    }
    left.ends_with(end)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn stars_stand_for_any_text() {
        for (pattern, name, expected) in [
            ("*", "", true),
            ("a", "a", true),
            ("a", "ab", false),
            ("a*", "a", true),
            ("*a*b", "xaxab", true),
            ("*a*b", "xaxabc", false),
            ("a*a", "a", false),
            ("a*a", "aa", true),
            ("*ab*ab", "abab", true),
            ("*ab*ab", "aba", false),
        ] {
            assert_eq!(name_matches(pattern, name), expected, "{pattern} on {name}");
        }
    }
}
