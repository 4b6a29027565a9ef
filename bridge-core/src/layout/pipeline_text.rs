//! Pipeline splits as people write them.

use super::{LayoutSpec, PipelineSplit};
use crate::error::{Error, Result};

/// Most symbols that a text may stand for, so that `t*999999999` is an error and not a machine without memory.
const MOST_SYMBOLS: usize = 1 << 16;

impl PipelineSplit {
    /// Reads which chunk has which layers, in the order of the forward pass, in one of two forms:
    ///
    /// - the number of layers of each chunk: `3,2,2`;
    /// - Megatron-Core's `pipeline_model_parallel_layout`, where `|` stands between chunks, `E` is the embedding, `t` a
    ///   decoder layer, `m` a multi-token prediction module and `L` the loss, `x*3` and `(x|y)*3` repeat, and commas are
    ///   ornament: `Et*3|(tt|)*4mL`.
    ///
    /// ```
    /// use bridge_core::LayoutSpec;
    /// use bridge_core::layout::PipelineSplit;
    ///
    /// let layout = LayoutSpec { vpp: 2, ..LayoutSpec::tp_pp(1, 2) };
    /// let split = PipelineSplit::parse("Et*3|t*4|tt|L", &layout, 9, 0)?;
    /// assert_eq!(split, PipelineSplit::parse("3,4,2,0", &layout, 9, 0)?);
    /// assert_eq!((split.layers(1), split.stage_of_layer(7)), (3..7, 0));
    /// # Ok::<(), bridge_core::Error>(())
    /// ```
    ///
    /// # Errors
    /// If the text is of neither form, or does not describe a model of `num_layers` layers and `num_mtp_modules`
    /// multi-token prediction modules in the chunks of `layout`. The embedding runs in the first chunk, and multi-token
    /// prediction in the last one, with the loss.
    pub fn parse(
        text: &str,
        layout: &LayoutSpec,
        num_layers: usize,
        num_mtp_modules: usize,
    ) -> Result<Self> {
        let numbers = text
            .trim_start()
            .chars()
            .next()
            .is_none_or(|c| c.is_ascii_digit());
        let sizes = if numbers {
            let sizes = text.split(',').map(|size| size.trim().parse());
            sizes.collect::<Result<Vec<usize>, _>>().map_err(|_| {
                "expected numbers of layers such as 3,2,2, or a layout such as Et*3|tt|ttL"
                    .to_owned()
            })
        } else {
            chunk_sizes(text, layout, num_mtp_modules)
        };
        let sizes =
            sizes.map_err(|problem| Error::InvalidArgument(format!("is \"{text}\", {problem}")))?;
        Self::uneven(layout, num_layers, &sizes)
    }
}

/// The decoder layers of each chunk.
fn chunk_sizes(text: &str, layout: &LayoutSpec, mtp: usize) -> Result<Vec<usize>, String> {
    let symbols = expand(text)?;
    let chunks: Vec<&[char]> = symbols.split(|symbol| *symbol == '|').collect();
    if chunks.len() != layout.pp * layout.vpp {
        let advice = match chunks.len() / layout.pp.max(1) {
            vpp if vpp >= 1 && vpp * layout.pp == chunks.len() => format!(
                "set the virtual pipeline size to {vpp}, or write {} chunks",
                layout.pp * layout.vpp
            ),
            _ => "their numbers must be equal".to_owned(),
        };
        return Err(format!(
            "which has {} chunks, for pp={} times vpp={}; {advice}",
            chunks.len(),
            layout.pp,
            layout.vpp
        ));
    }
    let order: String = symbols.iter().filter(|symbol| **symbol != '|').collect();
    let layers = order.chars().filter(|symbol| *symbol == 't').count();
    if order != format!("E{}{}L", "t".repeat(layers), "m".repeat(mtp)) {
        return Err(format!(
            "expected one E first, then the layers (t), then {} and one L last",
            match mtp {
                0 => "nothing".to_owned(),
                mtp => format!("{mtp} multi-token prediction modules (m)"),
            }
        ));
    }
    let holds = |chunk: usize, symbol| chunks[chunk].contains(&symbol);
    let last = chunks.len() - 1;
    if !holds(0, 'E') || !holds(last, 'L') {
        return Err(
            "expected E in the first chunk and L in the last; neither end may be empty".to_owned(),
        );
    }
    if (0..last).any(|chunk| holds(chunk, 'm')) {
        return Err(
            "expected every m in the last chunk: multi-token prediction runs with the loss"
                .to_owned(),
        );
    }
    let layers = |chunk: &&[char]| chunk.iter().filter(|symbol| **symbol == 't').count();
    Ok(chunks.iter().map(layers).collect())
}

/// The symbols that `text` stands for, repetitions written out.
fn expand(text: &str) -> Result<Vec<char>, String> {
    let mut characters = text
        .chars()
        .filter(|c| !c.is_whitespace() && *c != ',')
        .peekable();
    // Inside of parentheses, what stood before them waits.
    let mut outer: Option<Vec<char>> = None;
    let mut found: Vec<char> = Vec::new();
    while let Some(symbol) = characters.next() {
        let unit = match symbol {
            'E' | 't' | 'm' | 'L' | '|' => vec![symbol],
            '(' if outer.is_none() => {
                outer = Some(std::mem::take(&mut found));
                continue;
            }
            '(' => return Err("which has parentheses within parentheses".to_owned()),
            ')' => match outer.take() {
                Some(before) => std::mem::replace(&mut found, before),
                None => return Err("whose `)` closes nothing".to_owned()),
            },
            other => {
                return Err(format!(
                    "in which `{other}` means nothing; expected E, t, m, L, |, *N and parentheses"
                ));
            }
        };
        let mut times = 1;
        if characters.peek() == Some(&'*') {
            characters.next();
            let mut digits = String::new();
            while let Some(digit) = characters.next_if(char::is_ascii_digit) {
                digits.push(digit);
            }
            times = digits.parse().map_err(|_| {
                format!("whose `*` is followed by \"{digits}\", no number of times")
            })?;
        }
        let length = unit.len().saturating_mul(times).saturating_add(found.len());
        if length > MOST_SYMBOLS {
            return Err(format!("which stands for more than {MOST_SYMBOLS} layers"));
        }
        for _ in 0..times {
            found.extend_from_slice(&unit);
        }
    }
    match outer {
        None => Ok(found),
        Some(_) => Err("whose `(` is not closed".to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(text: &str, pp: usize, vpp: usize, layers: usize, mtp: usize) -> Result<Vec<usize>> {
        let layout = LayoutSpec {
            vpp,
            ..LayoutSpec::tp_pp(1, pp)
        };
        let split = PipelineSplit::parse(text, &layout, layers, mtp)?;
        Ok((0..split.num_chunks())
            .map(|c| split.layers(c).len())
            .collect())
    }

    #[test]
    fn both_forms_are_read() {
        for (text, pp, vpp, layers, mtp, sizes) in [
            ("3, 2,2", 3, 1, 7, 0, vec![3, 2, 2]),
            ("Et*3|t*4|t|L", 4, 1, 8, 0, vec![3, 4, 1, 0]),
            ("Ettt|(tt|)*3,mL", 5, 1, 9, 1, vec![3, 2, 2, 2, 0]),
            ("E|(t|)*6L", 4, 2, 6, 0, vec![0, 1, 1, 1, 1, 1, 1, 0]),
            ("(Et)*1(|tt)*3 m*2 L", 2, 2, 7, 2, vec![1, 2, 2, 2]),
            ("Et||t|tL", 2, 2, 3, 0, vec![1, 0, 1, 1]),
            ("Et*61L", 1, 1, 61, 0, vec![61]),
        ] {
            assert_eq!(
                read(text, pp, vpp, layers, mtp).expect(text),
                sizes,
                "{text}"
            );
        }
    }

    #[test]
    fn what_is_wrong_is_said() {
        for (text, pp, vpp, mtp, expected) in [
            ("3;4", 2, 1, 0, "expected numbers of layers such as 3,2,2"),
            ("", 2, 1, 0, "expected numbers of layers"),
            ("3,5", 2, 1, 0, "2 chunks of 8 layers, expected 2"),
            (
                "Ett|ttt|tt|L",
                2,
                1,
                0,
                "set the virtual pipeline size to 2, or write 2 chunks",
            ),
            (
                "Ett|ttt|ttL",
                2,
                1,
                0,
                "which has 3 chunks, for pp=2 times vpp=1",
            ),
            (
                "tt|tttttL",
                2,
                1,
                0,
                "expected one E first, then the layers (t), then nothing",
            ),
            ("Et*3|t*4mL", 2, 1, 0, "then nothing and one L last"),
            (
                "Et*3|t*4L",
                2,
                1,
                1,
                "then 1 multi-token prediction modules (m) and one L last",
            ),
            ("Et*7|m|L", 3, 1, 1, "every m in the last chunk"),
            ("|Et*7L", 2, 1, 0, "E in the first chunk"),
            ("Et*3|t*4L|", 3, 1, 0, "L in the last"),
            ("Et*3|x*4L", 2, 1, 0, "`x` means nothing"),
            ("Et*|ttL", 2, 1, 0, "followed by \"\", no number of times"),
            ("Et*99999999999|tL", 2, 1, 0, "stands for more than"),
            ("E(t*9999)*9999|tL", 2, 1, 0, "stands for more than"),
            ("E(t|(t))*3L", 2, 1, 0, "parentheses within parentheses"),
            ("E(t|tL", 2, 1, 0, "`(` is not closed"),
            ("Et)|tL", 2, 1, 0, "`)` closes nothing"),
        ] {
            let error = read(text, pp, vpp, 7, mtp).expect_err(text).to_string();
            assert!(error.contains(expected), "{text}: {error}");
        }
    }
}
