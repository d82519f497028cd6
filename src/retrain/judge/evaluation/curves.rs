//! The curves that a report draws.

use serde::{Deserialize, Serialize};

use super::figures::bin;
use super::ranking::Ranking;
use super::{CALIBRATION_BINS, EvaluationError, ScoredRow, check};

/// Bars of the histograms: fine enough to show shape, coarse enough for a few hundred rows.
const HISTOGRAM_BINS: usize = 20;

/// A point of a curve, both coordinates in `0..=1`.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Point {
    /// False positive rate, or recall.
    pub x: f64,
    /// True positive rate, or precision.
    pub y: f64,
}

/// One bar of the reliability diagram; bins as in [`Figures::ece`](super::Figures::ece).
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct ReliabilityBin {
    /// Where it begins; it is [`CALIBRATION_BINS`] times narrower than one.
    pub from: f64,
    /// Rows in it.
    pub rows: usize,
    /// Mean probability, weighted; absent for a bin without weight.
    pub probability: Option<f64>,
    /// Share of hateful rows, weighted; absent for a bin without weight.
    pub hateful: Option<f64>,
}

/// Rows by probability, in bins of equal width from 0 to 1.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Histogram {
    /// Rows that are not hateful.
    pub ok: Vec<usize>,
    /// Rows that are.
    pub hateful: Vec<usize>,
}

/// Everything that is drawn.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Curves {
    /// From `(0, 0)` to `(1, 1)`, one point for each distinct margin; empty with a single class.
    pub roc: Vec<Point>,
    /// One point for each distinct margin, recall rising; between two points precision is that of the
    /// right one. Empty with a single class.
    pub precision_recall: Vec<Point>,
    /// [`CALIBRATION_BINS`] bins.
    pub reliability: Vec<ReliabilityBin>,
    /// Unweighted.
    pub histogram: Histogram,
}

impl Curves {
    /// The curves of scored rows.
    ///
    /// # Errors
    /// [`EvaluationError`].
    pub fn new(rows: &[ScoredRow]) -> Result<Self, EvaluationError> {
        check(rows)?;
        let (roc, precision_recall) = ranked(rows);
        Ok(Self {
            roc,
            precision_recall,
            reliability: reliability(rows),
            histogram: histogram(rows),
        })
    }
}

fn ranked(rows: &[ScoredRow]) -> (Vec<Point>, Vec<Point>) {
    let margins: Vec<f64> = rows.iter().map(|row| row.margin).collect();
    let hateful: Vec<bool> = rows.iter().map(|row| row.hateful).collect();
    let weights: Vec<f64> = rows.iter().map(|row| row.weight).collect();
    let mut above = Ranking::new(&margins).above(&margins, &hateful, &weights);
    // Ranked first but without weight: a point there would divide by nothing.
    above.retain(|above| above.hateful + above.ok > 0.0);
    let Some(all) = above.last().copied() else {
        return (Vec::new(), Vec::new());
    };
    if all.hateful == 0.0 || all.ok == 0.0 {
        return (Vec::new(), Vec::new());
    }
    let mut roc = vec![Point { x: 0.0, y: 0.0 }];
    roc.extend(above.iter().map(|above| Point {
        x: above.ok / all.ok,
        y: above.hateful / all.hateful,
    }));
    let precision_recall = above.iter().map(|above| Point {
        x: above.hateful / all.hateful,
        y: above.hateful / (above.hateful + above.ok),
    });
    (roc, precision_recall.collect())
}

fn reliability(rows: &[ScoredRow]) -> Vec<ReliabilityBin> {
    #[derive(Clone, Copy, Default)]
    struct Sums {
        rows: usize,
        weight: f64,
        probability: f64,
        hateful: f64,
    }
    let mut bins = [Sums::default(); CALIBRATION_BINS];
    for row in rows {
        let sums = &mut bins[bin(row.probability, CALIBRATION_BINS)];
        sums.rows += 1;
        sums.weight += row.weight;
        sums.probability += row.weight * row.probability;
        sums.hateful += if row.hateful { row.weight } else { 0.0 };
    }
    let mean = |sum: f64, sums: &Sums| (sums.weight > 0.0).then(|| sum / sums.weight);
    let bins = bins.iter().enumerate().map(|(index, sums)| ReliabilityBin {
        from: index as f64 / CALIBRATION_BINS as f64,
        rows: sums.rows,
        probability: mean(sums.probability, sums),
        hateful: mean(sums.hateful, sums),
    });
    bins.collect()
}

fn histogram(rows: &[ScoredRow]) -> Histogram {
    let mut histogram = Histogram {
        ok: vec![0; HISTOGRAM_BINS],
        hateful: vec![0; HISTOGRAM_BINS],
    };
    for row in rows {
        let side = if row.hateful {
            &mut histogram.hateful
        } else {
            &mut histogram.ok
        };
        side[bin(row.probability, HISTOGRAM_BINS)] += 1;
    }
    histogram
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::retrain::judge::evaluation::tests::row;

    fn points(points: &[Point]) -> Vec<(f64, f64)> {
        points.iter().map(|point| (point.x, point.y)).collect()
    }

    #[test]
    fn curves_of_a_small_case() {
        let rows = [
            row(3.0, true, 1.0),
            row(1.0, false, 1.0),
            row(1.0, true, 1.0),
            row(-2.0, false, 1.0),
        ];
        let curves = Curves::new(&rows).unwrap();
        assert_eq!(points(&curves.roc), [(0.0, 0.0), (0.0, 0.5), (0.5, 1.0), (1.0, 1.0)]);
        assert_eq!(
            points(&curves.precision_recall),
            [(0.5, 1.0), (1.0, 2.0 / 3.0), (1.0, 0.5)]
        );
        let filled: Vec<_> = curves.reliability.iter().filter(|bin| bin.rows > 0).collect();
        assert_eq!(
            filled.iter().map(|bin| (bin.rows, bin.hateful)).collect::<Vec<_>>(),
            [(1, Some(0.0)), (2, Some(0.5)), (1, Some(1.0))]
        );
        assert_eq!(
            (
                curves.histogram.ok.iter().sum::<usize>(),
                curves.histogram.hateful.iter().sum::<usize>()
            ),
            (2, 2)
        );
    }

    #[test]
    fn a_single_class_has_no_curve() {
        let curves = Curves::new(&[row(1.0, true, 1.0), row(2.0, true, 1.0)]).unwrap();
        assert!(curves.roc.is_empty() && curves.precision_recall.is_empty());
        assert_eq!(curves.reliability.len(), CALIBRATION_BINS);
    }

    #[test]
    fn rows_without_weight_draw_nothing() {
        let rows = [row(9.0, false, 0.0), row(1.0, true, 1.0), row(-1.0, false, 1.0)];
        let curves = Curves::new(&rows).unwrap();
        assert_eq!(points(&curves.roc), [(0.0, 0.0), (0.0, 1.0), (1.0, 1.0)]);
        assert_eq!(points(&curves.precision_recall)[0], (1.0, 1.0));
    }
}
