//! Compares the challenger with the champion on the judged rows, and checks it against the golden set.

use super::calibrate::CalibratedChallenger;
use super::champion::MeasuredChampion;
use super::cross_fit::CrossFitted;
use super::measurement::{MeasuredAdapter, TestSettings};
use super::split::FeedbackSplit;
use crate::classifier::golden;
use crate::classifier::golden::{Arithmetic, GoldenCase, GoldenText};
use crate::retrain::data::dataset::LabelledRow;
use crate::retrain::judge::calibration::FittedCalibration;
use crate::retrain::judge::gate::{GateRow, GoldenSet, TrainingRows, Verdict, judge};
use crate::retrain::judge::measure;
use crate::retrain::judge::thresholds::ThresholdDerivation;

/// The gate's verdict, with what is known about the challenger. The model itself is no longer in memory.
pub(super) struct Judged {
    pub(super) challenger: MeasuredAdapter,
    pub(super) calibration: FittedCalibration,
    pub(super) thresholds: ThresholdDerivation,
    /// The golden set of the new version, with the challenger's margins.
    pub(super) golden: Vec<GoldenCase>,
    pub(super) verdict: Verdict,
}

impl Judged {
    /// Evaluates the challenger on the test part, scores the golden set and applies the gate. The operator's
    /// `golden_texts` are added to the built-in ones.
    pub(super) fn new(
        challenger: CalibratedChallenger,
        champion: &MeasuredChampion,
        split: &FeedbackSplit,
        cross_fitted: Option<&CrossFitted>,
        mut golden_texts: Vec<GoldenText>,
        settings: &TestSettings,
    ) -> anyhow::Result<Self> {
        let CalibratedChallenger {
            mut classifier,
            calibration,
            thresholds,
            test_margins,
            scale,
        } = challenger;
        let test = &split.dataset.test;
        let measured = settings.measure(test, test_margins, calibration.calibration, thresholds.derived())?;

        let mut all_texts = golden::builtin_texts();
        all_texts.append(&mut golden_texts);
        let arithmetic = Arithmetic::of(classifier.identity());
        let golden = golden::score_texts(&mut classifier, &champion.prompter, all_texts, arithmetic)
            .map_err(anyhow::Error::msg)?;

        let gate_row = |row: &LabelledRow, fold, champion, challenger| GateRow {
            hateful: measure::is_hateful(row),
            weight: measure::traffic_weight(row),
            community: row.feedback.community_id.clone(),
            fold,
            champion,
            challenger,
        };
        let tested = (0..).zip(test).map(|(number, row)| {
            let predictions = [&champion.measured, &measured].map(|adapter| adapter.prediction(number));
            gate_row(row, 0, predictions[0], predictions[1])
        });
        let mut rows: Vec<GateRow> = tested.collect();
        let folds = cross_fitted
            .into_iter()
            .flat_map(|fitted| &fitted.rows)
            .filter(|row| row.judges);
        rows.extend(folds.zip(&champion.fold_margins).map(|(judged, &margin)| {
            let champion = champion.measured.predict(margin);
            gate_row(
                &judged.row,
                judged.fold,
                champion,
                measured.predict(scale.margin(judged.standard_margin)),
            )
        }));
        let training_rows = TrainingRows {
            champion: split.champion_rows,
            challenger: split.dataset.train.len(),
        };
        let golden_set = GoldenSet {
            cases: golden.len(),
            failed: golden::misclassified(&golden),
        };
        Ok(Self {
            verdict: judge(&rows, training_rows, golden_set, settings.gate),
            challenger: measured,
            calibration,
            thresholds,
            golden,
        })
    }
}
