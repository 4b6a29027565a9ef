//! Which of cuBLASLt's candidates was fastest for a product, kept on disk from run to run.

use std::collections::HashMap;
use std::fs::OpenOptions;
use std::io::Write;
use std::path::PathBuf;

use sha2::{Digest, Sha256};

/// Choices for one kind of GPU and one version of the library, whose order of candidates they refer to.
#[derive(Default)]
pub(crate) struct TunedProducts {
    path: Option<PathBuf>,
    known: HashMap<String, usize>,
}

impl TunedProducts {
    /// What earlier runs found. The file is a convenience: lines that make no sense are left out, and where it cannot be
    /// read or written every run measures for itself.
    pub(crate) fn open(gpu: &str, version: usize) -> Self {
        let gpu: String = gpu
            .chars()
            .map(|c| if c.is_ascii_alphanumeric() { c } else { '_' })
            .collect();
        let path = crate::nvrtc::cache_folder()
            .map(|folder| folder.join(format!("products-{gpu}-{version}.txt")));
        Self::read(path)
    }

    fn read(path: Option<PathBuf>) -> Self {
        let text = path
            .as_ref()
            .and_then(|path| std::fs::read_to_string(path).ok())
            .unwrap_or_default();
        let line = |line: &str| {
            let (product, candidate) = line.split_once(' ')?;
            Some((product.to_owned(), candidate.parse().ok()?))
        };
        let known = text.lines().filter_map(line).collect();
        Self { path, known }
    }

    /// The candidate chosen for a product, by a description that holds all that matters.
    pub(crate) fn get(&self, product: &str) -> Option<usize> {
        self.known.get(&digest(product)).copied()
    }

    /// Remembers a choice.
    pub(crate) fn put(&mut self, product: String, candidate: usize) {
        let product = digest(&product);
        if let Some(path) = &self.path {
            let open = || {
                std::fs::create_dir_all(path.parent()?).ok()?;
                OpenOptions::new().create(true).append(true).open(path).ok()
            };
            if let Some(mut file) = open() {
                // One short write, so that the lines of processes that run at once do not mix.
                let _ = file.write_all(format!("{product} {candidate}\n").as_bytes());
            }
        }
        self.known.insert(product, candidate);
    }
}

fn digest(product: &str) -> String {
    let hash = Sha256::digest(product.as_bytes());
    hash.iter()
        .take(12)
        .map(|byte| format!("{byte:02x}"))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn choices_survive_a_run_and_nonsense_does_not() {
        let folder = std::env::temp_dir().join(format!("bridge-cuda-tuned-{}", std::process::id()));
        let path = folder.join("products.txt");
        let mut tuned = TunedProducts::read(Some(path.clone()));
        tuned.put("a product".into(), 3);
        tuned.put("another".into(), 0);
        let mut text = std::fs::read_to_string(&path).unwrap();
        text.push_str("broken\nworse x\n");
        std::fs::write(&path, text).unwrap();
        let tuned = TunedProducts::read(Some(path));
        assert_eq!(tuned.get("a product"), Some(3));
        assert_eq!(tuned.get("another"), Some(0));
        assert_eq!((tuned.get("unknown"), tuned.known.len()), (None, 2));
        std::fs::remove_dir_all(folder).unwrap();
    }
}
