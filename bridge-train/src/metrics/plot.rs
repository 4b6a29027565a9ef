//! A picture of the loss, drawn without any font or library of the system.

use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use plotters::prelude::*;
use plotters::style::{FontStyle, register_font};

use super::jsonl::History;
use crate::callback::{Callback, Summary};
use crate::error::{Error, Result};

/// Name of the picture.
pub const LOSS_PLOT_FILE: &str = "loss.png";

/// Width and height in pixels.
const SIZE: (u32, u32) = (1200, 750);

/// Draws `loss.png` at the end of a run, from its `metrics.jsonl`, so that a continued run shows its whole curve.
#[derive(Debug)]
pub struct LossPlot {
    dir: PathBuf,
    title: String,
}

impl LossPlot {
    /// Reads and writes in `dir`.
    pub fn new(dir: &Path, title: impl Into<String>) -> Self {
        Self {
            dir: dir.to_owned(),
            title: title.into(),
        }
    }
}

impl Callback for LossPlot {
    fn on_train_end(&mut self, _summary: &Summary) -> Result<()> {
        let history = History::read(&self.dir)?;
        if history.train.is_empty() && history.eval.is_empty() {
            return Ok(());
        }
        draw_loss(&history, &self.title, &self.dir.join(LOSS_PLOT_FILE))
    }
}

/// Draws the training and evaluation loss over the steps into a PNG at `path`.
///
/// # Errors
/// If the picture cannot be written.
pub fn draw_loss(history: &History, title: &str, path: &Path) -> Result<()> {
    register_fonts();
    // The encoder chooses its format by the file's ending, so the temporary file keeps it.
    let temporary = path.with_extension("tmp.png");
    draw(history, title, &temporary).map_err(|reason| Error::Plot {
        path: path.to_owned(),
        reason,
    })?;
    std::fs::rename(&temporary, path).map_err(|source| Error::io("write", path, source))
}

fn register_fonts() {
    static ONCE: OnceLock<()> = OnceLock::new();
    ONCE.get_or_init(|| {
        let registered = register_font("sans-serif", FontStyle::Normal, dejavu::sans::regular());
        assert!(registered.is_ok(), "the embedded font is a valid font");
    });
}

fn draw(history: &History, title: &str, path: &Path) -> Result<(), String> {
    const TRAIN: RGBColor = RGBColor(150, 185, 220);
    const TREND: RGBColor = RGBColor(25, 95, 170);
    const EVAL: RGBColor = RGBColor(210, 80, 30);

    let trend = smooth(&history.train);
    let (x_range, y_range) = ranges(history);
    let root = BitMapBackend::new(path, SIZE).into_drawing_area();
    let text = |error: &dyn std::fmt::Display| error.to_string();
    root.fill(&WHITE).map_err(|e| text(&e))?;
    let mut chart = ChartBuilder::on(&root)
        .caption(title, ("sans-serif", 26))
        .margin(20)
        .x_label_area_size(60)
        .y_label_area_size(80)
        .build_cartesian_2d(x_range, y_range)
        .map_err(|e| text(&e))?;
    chart
        .configure_mesh()
        .x_desc("step")
        .y_desc("loss (nats per token)")
        .x_labels(10)
        .y_labels(10)
        .x_label_formatter(&|x| format!("{x:.0}"))
        .y_label_formatter(&|y| format!("{y:.2}"))
        .axis_desc_style(("sans-serif", 20))
        .label_style(("sans-serif", 16))
        .light_line_style(WHITE)
        .draw()
        .map_err(|e| text(&e))?;

    let points = |curve: &[(u64, f64)]| {
        curve
            .iter()
            .map(|(x, y)| (*x as f64, *y))
            .collect::<Vec<_>>()
    };
    let mut line =
        |curve: Vec<(f64, f64)>, label: &str, color: RGBColor, width: u32, dots: bool| {
            let style = color.stroke_width(width);
            // A single point makes no line.
            if dots || curve.len() == 1 {
                let marks = curve
                    .iter()
                    .map(|point| Circle::new(*point, width + 2, color.filled()));
                chart.draw_series(marks).map_err(|e| e.to_string())?;
            }
            chart
                .draw_series(LineSeries::new(curve, style))
                .map_err(|e| e.to_string())?
                .label(label)
                .legend(move |(x, y)| {
                    PathElement::new([(x, y), (x + 28, y)], color.stroke_width(3))
                });
            Ok::<(), String>(())
        };
    if !history.train.is_empty() {
        line(
            points(&history.train),
            "training, each step",
            TRAIN,
            1,
            false,
        )?;
        line(points(&trend), "training, smoothed", TREND, 2, false)?;
    }
    if !history.eval.is_empty() {
        line(points(&history.eval), "evaluation", EVAL, 2, true)?;
    }
    chart
        .configure_series_labels()
        .legend_area_size(38)
        .position(SeriesLabelPosition::UpperRight)
        .background_style(WHITE.mix(0.85))
        .border_style(BLACK.mix(0.3))
        .label_font(("sans-serif", 18))
        .margin(12)
        .draw()
        .map_err(|e| text(&e))?;
    root.present().map_err(|e| text(&e))
}

/// The drawn part of both axes. Losses of the first steps may tower over the rest; they stay in view.
fn ranges(history: &History) -> (std::ops::Range<f64>, std::ops::Range<f64>) {
    let all = || history.train.iter().chain(&history.eval);
    let last = all().map(|(x, _)| *x).max().unwrap_or(1).max(1) as f64;
    let first = all().map(|(x, _)| *x).min().unwrap_or(0) as f64;
    let low = all().map(|(_, y)| *y).fold(f64::INFINITY, f64::min);
    let high = all().map(|(_, y)| *y).fold(f64::NEG_INFINITY, f64::max);
    let pad = ((high - low) * 0.05).max(1e-3);
    let first = if first < last { first } else { first - 1.0 };
    (first..last, (low - pad).max(0.0).min(low)..high + pad)
}

/// A centred moving average over about a fortieth of the curve.
fn smooth(curve: &[(u64, f64)]) -> Vec<(u64, f64)> {
    let half = (curve.len() / 80).max(1);
    (0..curve.len())
        .map(|i| {
            let window = &curve[i.saturating_sub(half)..(i + half + 1).min(curve.len())];
            (
                curve[i].0,
                window.iter().map(|(_, y)| y).sum::<f64>() / window.len() as f64,
            )
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_picture_is_a_png_and_nothing_else_is_left() {
        for train in [
            vec![],
            vec![(3, 4.0)],
            (1..200).map(|i| (i, 5.0 / i as f64)).collect::<Vec<_>>(),
        ] {
            let dir = tempfile::tempdir().unwrap();
            let history = History {
                train,
                eval: vec![(1, 4.5), (150, 1.0)],
            };
            draw_loss(&history, "a run", &dir.path().join(LOSS_PLOT_FILE)).unwrap();
            let files: Vec<_> = std::fs::read_dir(dir.path())
                .unwrap()
                .map(|f| f.unwrap().file_name())
                .collect();
            assert_eq!(files, [LOSS_PLOT_FILE]);
            let bytes = std::fs::read(dir.path().join(LOSS_PLOT_FILE)).unwrap();
            assert!(
                bytes.starts_with(b"\x89PNG") && bytes.len() > 5000,
                "{} bytes",
                bytes.len()
            );
        }
    }

    #[test]
    fn smoothing_keeps_the_length_and_a_constant() {
        let curve: Vec<_> = (0..500).map(|i| (i, 2.0)).collect();
        assert_eq!(smooth(&curve), curve);
    }
}
