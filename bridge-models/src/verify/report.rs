//! What a comparison found.

use std::fmt;

use serde::Serialize;

/// One comparison with its outcome.
#[derive(Debug, Clone, PartialEq)]
pub struct Comparison {
    /// What was compared, in words.
    pub what: String,
    /// What was found and what is allowed, in words.
    pub detail: String,
    /// Whether it holds.
    pub passed: bool,
}

/// The outcome of [`verify`](super::verify). Serializes to the fields that scripts rely on; a number is `null` where
/// the reference lacks it or it was not asked for.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct VerifyReport {
    /// Model family.
    pub family: String,
    /// Parallel layout.
    pub layout: String,
    /// Backend that ran the model.
    pub backend: String,
    /// Arithmetic.
    pub dtype: String,
    /// Largest absolute difference of any logit.
    pub logits_max_abs_diff: Option<f64>,
    /// Mean loss found.
    pub loss: Option<f64>,
    /// Mean loss of the reference.
    pub loss_reference: Option<f64>,
    /// Largest relative difference of any gradient's norm, measured against the reference's norm or, where that is
    /// tiny, against the size at which the absolute floor takes over.
    pub grad_norm_max_rel_diff: Option<f64>,
    /// Name on disk of the gradient with that difference.
    pub worst_grad: Option<String>,
    /// Whether greedy texts with and without a cache equal the reference's.
    pub greedy_match: Option<bool>,
    /// Whether everything that was compared is within its tolerance.
    pub passed: bool,
    /// Everything that was compared, for people.
    #[serde(skip)]
    pub comparisons: Vec<Comparison>,
}

impl VerifyReport {
    /// A report in which nothing has been compared yet.
    pub fn new(family: &str, layout: &str, backend: &str, dtype: &str) -> Self {
        Self {
            family: family.to_owned(),
            layout: layout.to_owned(),
            backend: backend.to_owned(),
            dtype: dtype.to_owned(),
            logits_max_abs_diff: None,
            loss: None,
            loss_reference: None,
            grad_norm_max_rel_diff: None,
            worst_grad: None,
            greedy_match: None,
            passed: true,
            comparisons: Vec::new(),
        }
    }

    /// Records a difference; NaN does not pass.
    pub fn compare(&mut self, what: impl Into<String>, difference: f64, allowed: f64) {
        self.record(
            what,
            difference <= allowed,
            format!("{difference:.3e}, allowed {allowed:.0e}"),
        );
    }

    pub(super) fn compare_exact(
        &mut self,
        what: impl Into<String>,
        found: &[u32],
        expected: &[u32],
    ) {
        let same = found
            .iter()
            .zip(expected)
            .take_while(|(a, b)| a == b)
            .count();
        let detail = match (found.get(same), expected.get(same)) {
            (None, None) => format!("{} tokens equal", expected.len()),
            (found, expected) => {
                let show = |token: Option<&u32>| token.map_or("nothing".to_owned(), u32::to_string);
                format!(
                    "token {same} is {}, expected {}",
                    show(found),
                    show(expected)
                )
            }
        };
        self.record(what, found == expected, detail);
    }

    fn record(&mut self, what: impl Into<String>, passed: bool, detail: String) {
        self.passed &= passed;
        self.comparisons.push(Comparison {
            what: what.into(),
            detail,
            passed,
        });
    }
}

impl fmt::Display for VerifyReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(
            f,
            "{} ({}, {}, {})",
            self.family, self.layout, self.backend, self.dtype
        )?;
        for Comparison {
            what,
            detail,
            passed,
        } in &self.comparisons
        {
            writeln!(
                f,
                "  {} {what}: {detail}",
                if *passed { "ok    " } else { "FAILED" }
            )?;
        }
        f.write_str(if self.passed { "passed" } else { "FAILED" })
    }
}
