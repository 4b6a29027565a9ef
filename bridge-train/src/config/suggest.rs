//! Did-you-mean for words with a fixed list of choices.

use bridge_core::registry::nearest;

/// The message for a word that is not among `names`.
pub(crate) fn unknown_choice(word: &str, names: &[&str]) -> String {
    let names_text = names.join(", ");
    match nearest(word, names.iter().copied()) {
        Some(name) => format!("`{word}` is not one of {names_text}; did you mean `{name}`?"),
        None => format!("`{word}` is not one of {names_text}"),
    }
}
