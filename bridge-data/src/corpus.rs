//! The bundled corpus: a novel in the public domain, so that a first run needs no data.
//!
//! *Moby-Dick; or, The Whale* by Herman Melville (1851), in chapters. `corpus/README.md` says where the text comes from and why
//! it is free.

/// Name of the corpus, for messages.
pub const NAME: &str = "Moby-Dick (bundled)";

const TEXT: &str = include_str!("../corpus/moby_dick.txt");

/// What stands between two chapters.
const SEPARATOR: &str = "\n\n\n";

/// The whole text.
pub fn text() -> &'static str {
    TEXT
}

/// The documents: 135 chapters and the epilogue, each with its heading and a line end at its end.
pub fn documents() -> impl Iterator<Item = &'static str> {
    // The separator's first line end belongs to the chapter before it.
    let mut rest = TEXT;
    std::iter::from_fn(move || {
        if rest.is_empty() {
            return None;
        }
        let (document, after) = match rest.find(SEPARATOR) {
            Some(end) => (&rest[..=end], &rest[end + SEPARATOR.len()..]),
            None => (rest, ""),
        };
        rest = after;
        Some(document)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_corpus_is_a_megabyte_of_chapters() {
        assert!(text().len() > 1_000_000, "{} bytes", text().len());
        let chapters = documents().collect::<Vec<_>>();
        assert_eq!(chapters.len(), 136);
        for (index, chapter) in chapters[..135].iter().enumerate() {
            assert!(
                chapter.starts_with(&format!("CHAPTER {}. ", index + 1)),
                "{:?}",
                &chapter[..20]
            );
        }
        assert!(
            chapters
                .iter()
                .all(|chapter| chapter.len() > 200 && chapter.ends_with('\n'))
        );
        assert_eq!(chapters.join("\n\n"), text());
    }
}
