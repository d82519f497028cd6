//! The curves and histograms that a report shows.

use serde::{Deserialize, Serialize};

use super::figures::bin;
use super::ranking::Ranking;
use super::{CALIBRATION_BINS, EvaluationError, ScoredRow, check};

/// Number of bars in a histogram: enough to show its shape, and few enough for a few hundred rows.
const HISTOGRAM_BINS: usize = 20;

/// A point of a curve. Both coordinates are from 0 to 1.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Point {
    /// The false positive rate (ROC curve) or the recall (precision-recall curve).
    pub x: f64,
    /// The true positive rate (ROC curve) or the precision (precision-recall curve).
    pub y: f64,
}

/// One bin of the reliability diagram. The bins are those of [`Figures::ece`](super::Figures::ece).
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct ReliabilityBin {
    /// The lowest probability in the bin, whose width is 1 / [`CALIBRATION_BINS`].
    pub from: f64,
    /// Number of rows in the bin.
    pub rows: usize,
    /// Weighted mean probability; absent if the bin has no weight.
    pub probability: Option<f64>,
    /// Weighted share of hateful rows; absent if the bin has no weight.
    pub hateful: Option<f64>,
}

/// Unweighted counts of rows by probability, in 20 bins of equal width from 0 to 1.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Histogram {
    /// Counts of the rows that are not labelled hateful.
    pub ok: Vec<usize>,
    /// Counts of the rows that are labelled hateful.
    pub hateful: Vec<usize>,
}

/// The curves and histograms of one adapter.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Curves {
    /// The ROC curve from `(0, 0)` to `(1, 1)`, with one point for each distinct margin; empty if there is a single
    /// class.
    pub roc: Vec<Point>,
    /// The precision-recall curve, with one point for each distinct margin, by increasing recall. Between two points,
    /// the precision is that of the right one. Empty if there is a single class.
    pub precision_recall: Vec<Point>,
    /// The reliability diagram, with [`CALIBRATION_BINS`] bins.
    pub reliability: Vec<ReliabilityBin>,
    /// The histograms of both classes.
    pub histogram: Histogram,
}

impl Curves {
    /// Computes the curves of scored rows.
    ///
    /// # Errors
    /// Returns an error if a margin, probability or weight is outside its range, or no row has a positive weight.
    pub fn new(rows: &[ScoredRow]) -> Result<Self, EvaluationError> {
        check(rows)?;
        let (roc, precision_recall) = ranking_curves(rows);
        Ok(Self {
            roc,
            precision_recall,
            reliability: reliability(rows),
            histogram: histogram(rows),
        })
    }
}

/// Returns the ROC curve and the precision-recall curve.
fn ranking_curves(rows: &[ScoredRow]) -> (Vec<Point>, Vec<Point>) {
    let margins: Vec<f64> = rows.iter().map(|row| row.margin).collect();
    let hateful: Vec<bool> = rows.iter().map(|row| row.hateful).collect();
    let weights: Vec<f64> = rows.iter().map(|row| row.weight).collect();
    let mut sums = Ranking::new(&margins).cumulative_weights(&margins, &hateful, &weights);
    // If the first rows have no weight, the precision is not defined there.
    sums.retain(|sum| sum.hateful + sum.ok > 0.0);
    let Some(all) = sums.last().copied() else {
        return (Vec::new(), Vec::new());
    };
    if all.hateful == 0.0 || all.ok == 0.0 {
        return (Vec::new(), Vec::new());
    }
    let mut roc = vec![Point { x: 0.0, y: 0.0 }];
    roc.extend(sums.iter().map(|sum| Point {
        x: sum.ok / all.ok,
        y: sum.hateful / all.hateful,
    }));
    let precision_recall = sums.iter().map(|sum| Point {
        x: sum.hateful / all.hateful,
        y: sum.hateful / (sum.hateful + sum.ok),
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
        let counts = if row.hateful {
            &mut histogram.hateful
        } else {
            &mut histogram.ok
        };
        counts[bin(row.probability, HISTOGRAM_BINS)] += 1;
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
    fn curves_of_a_few_rows_are_exact() {
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
    fn a_single_class_has_no_ranking_curves() {
        let curves = Curves::new(&[row(1.0, true, 1.0), row(2.0, true, 1.0)]).unwrap();
        assert!(curves.roc.is_empty() && curves.precision_recall.is_empty());
        assert_eq!(curves.reliability.len(), CALIBRATION_BINS);
    }

    #[test]
    fn rows_without_weight_add_no_points() {
        let rows = [row(9.0, false, 0.0), row(1.0, true, 1.0), row(-1.0, false, 1.0)];
        let curves = Curves::new(&rows).unwrap();
        assert_eq!(points(&curves.roc), [(0.0, 0.0), (0.0, 1.0), (1.0, 1.0)]);
        assert_eq!(points(&curves.precision_recall)[0], (1.0, 1.0));
    }
}
