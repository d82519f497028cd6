use proptest::prelude::*;

use super::*;
use crate::retrain::judge::sampling::wilson_lower;

const TARGETS: ThresholdTargets = ThresholdTargets {
    block_precision: 0.9,
    review: ReviewTarget::Recall(0.8),
    provisional: false,
};

fn row(probability: f64, hateful: bool, inclusion: Option<f64>) -> ThresholdRow {
    ThresholdRow {
        probability,
        hateful,
        inclusion,
    }
}

/// Returns rows with probabilities from 0.001 to 0.999, of which those from `from` on are hateful.
fn separated(from: f64, inclusion: Option<f64>) -> Vec<ThresholdRow> {
    let probabilities = (1..1000).map(|index| f64::from(index) / 1000.0);
    probabilities
        .map(|probability| row(probability, probability >= from, inclusion))
        .collect()
}

#[test]
fn sampled_rows_give_both_thresholds() {
    let derivation = ThresholdDerivation::derive(&separated(0.8, Some(0.1)), TARGETS).unwrap();
    assert!(derivation.is_representative());
    assert_eq!((derivation.rows, derivation.hateful), (999, 200));
    let ThresholdOutcome::Derived { value, figures, .. } = derivation.block else {
        panic!("{:?}", derivation.block);
    };
    // Below 0.8, the precision falls, and so does its bound.
    assert!(
        figures.precision_bound >= 0.9 && (0.785..0.8).contains(&value),
        "{value}"
    );
    assert_eq!(figures.recall, Some(1.0));
    // The recall is reached at 0.84, which is above the block threshold.
    assert!(
        matches!(derivation.review, ThresholdOutcome::Derived { value: review, limited_by_block: true, .. } if review == value)
    );
}

#[test]
fn the_review_threshold_keeps_within_a_share_of_the_traffic() {
    let rows = separated(0.8, Some(0.1));
    let check = |share, expected: f64| {
        let targets = ThresholdTargets {
            review: ReviewTarget::Share(share),
            ..TARGETS
        };
        let value = ThresholdDerivation::derive(&rows, targets).unwrap().review.value();
        assert!((value.unwrap() - expected).abs() < 0.0011, "{share}: {value:?}");
    };
    check(0.5, 0.5);
    check(0.3, 0.7);
    let one_value: Vec<_> = (0..200).map(|index| row(0.5, index % 2 == 0, Some(1.0))).collect();
    let targets = ThresholdTargets {
        review: ReviewTarget::Share(0.5),
        ..TARGETS
    };
    let reason = NoThreshold::TooMany {
        target: 0.5,
        least: 1.0,
    };
    assert_eq!(
        ThresholdDerivation::derive(&one_value, targets).unwrap().review,
        ThresholdOutcome::None { reason }
    );
}

#[test]
fn sampled_rows_are_weighted_by_their_inverse_probability() {
    // Of the rows above 0.5, half are hateful among the labelled ones, but one in eleven in the traffic.
    let mut rows = vec![row(0.9, true, Some(1.0)); 200];
    rows.extend(vec![row(0.9, false, Some(0.1)); 200]);
    rows.extend(vec![row(0.1, false, Some(0.1)); 200]);
    let targets = ThresholdTargets {
        block_precision: 0.05,
        ..TARGETS
    };
    let derivation = ThresholdDerivation::derive(&rows, targets).unwrap();
    let ThresholdOutcome::Derived { value, figures, .. } = derivation.block else {
        panic!("{:?}", derivation.block);
    };
    assert_eq!(value, 0.9);
    assert!((figures.precision - 200.0 / 2200.0).abs() < 1e-12);
    assert!((figures.share - 2200.0 / 4200.0).abs() < 1e-12);
}

#[test]
fn without_enough_sampled_rows_no_review_threshold_is_derived() {
    let check = |rows: &[ThresholdRow], expected: NoThreshold| {
        for review in [ReviewTarget::Recall(0.8), ReviewTarget::Share(0.1)] {
            let derivation = ThresholdDerivation::derive(rows, ThresholdTargets { review, ..TARGETS }).unwrap();
            assert_eq!(derivation.review, ThresholdOutcome::None { reason: expected });
            assert!(!derivation.is_representative());
        }
    };
    check(&separated(0.8, None), NoThreshold::NoSample);
    let mut some = separated(0.8, None);
    some.iter_mut().take(99).for_each(|row| row.inclusion = Some(0.5));
    check(&some, NoThreshold::SmallSample { effective: 99.0 });
    assert!(
        ThresholdDerivation::derive(&some, TARGETS)
            .unwrap()
            .block
            .value()
            .is_some()
    );
    let few = separated(0.99, Some(0.5));
    let derivation = ThresholdDerivation::derive(&few, TARGETS).unwrap();
    let reason = NoThreshold::FewHateful { effective: 10.0 };
    assert_eq!(derivation.review, ThresholdOutcome::None { reason });
}

const PROVISIONAL: ThresholdTargets = ThresholdTargets {
    provisional: true,
    ..TARGETS
};

/// Returns rows with evenly spread probabilities whose labels agree with them.
fn calibrated(count: u32) -> Vec<ThresholdRow> {
    let one = |index: u32| {
        let probability = (f64::from(index) + 0.5) / f64::from(count);
        // A low-discrepancy sequence, so that the share of hateful rows follows the probability closely.
        let draw = (f64::from(index) * 0.618_033_988_749_895).fract();
        row(probability, draw < probability, None)
    };
    (0..count).map(one).collect()
}

#[test]
fn few_rows_give_provisional_thresholds_with_intervals() {
    let rows = calibrated(30);
    let strict = ThresholdDerivation::derive(&rows, TARGETS).unwrap();
    assert_eq!((strict.block.value(), strict.review.value()), (None, None));
    let derivation = ThresholdDerivation::derive(&rows, PROVISIONAL).unwrap();
    assert!(derivation.block.is_provisional() && derivation.review.is_provisional());
    assert!(derivation.derived().provisional && !derivation.derived().representative);
    // The mean of the probabilities from 0.8 on is 0.9, and the part of all probability from 0.45 on is 0.8.
    let [block, review] = [&derivation.block, &derivation.review].map(|outcome| outcome.value().unwrap());
    assert!(
        (0.7..0.9).contains(&block) && (0.35..0.55).contains(&review),
        "{block} {review}"
    );
    let ThresholdOutcome::Derived { figures, .. } = derivation.review else {
        panic!("{:?}", derivation.review);
    };
    let [low, high] = figures.recall_interval.unwrap();
    assert!(low > 0.5 && low < 0.8 && high > 0.8 && high < 1.0, "{low} {high}");
}

#[test]
fn intervals_narrow_as_rows_are_added() {
    let width = |count| {
        let derivation = ThresholdDerivation::derive(&calibrated(count), PROVISIONAL).unwrap();
        let ThresholdOutcome::Derived { figures, .. } = derivation.block else {
            panic!("{:?}", derivation.block);
        };
        let [low, high] = figures.precision_interval.unwrap();
        high - low
    };
    let widths = [30, 300, 3000].map(width);
    assert!(widths[0] > 1.3 * widths[1] && widths[1] > 1.3 * widths[2], "{widths:?}");
}

/// With enough rows, the block threshold reaches its target by the bound whether estimates are allowed or not.
#[test]
fn an_estimate_never_replaces_a_threshold_that_reaches_its_bound() {
    let rows = separated(0.8, Some(0.1));
    let [strict, lenient] = [TARGETS, PROVISIONAL].map(|targets| ThresholdDerivation::derive(&rows, targets).unwrap());
    assert_eq!((strict.block, strict.review), (lenient.block, lenient.review));
    assert!(!lenient.derived().provisional);
}

#[test]
fn nothing_is_estimated_from_a_handful_of_rows_and_no_share_without_a_sample() {
    let few = [vec![row(0.9, true, None); 4], vec![row(0.1, false, None); 40]].concat();
    let derivation = ThresholdDerivation::derive(&few, PROVISIONAL).unwrap();
    assert_eq!((derivation.block.value(), derivation.review.value()), (None, None));
    let share = ThresholdTargets {
        review: ReviewTarget::Share(0.1),
        ..PROVISIONAL
    };
    let derivation = ThresholdDerivation::derive(&calibrated(300), share).unwrap();
    let reason = NoThreshold::NoSample;
    assert_eq!(derivation.review, ThresholdOutcome::None { reason });
}

/// Derivations in manifests have no intervals and are not provisional.
#[test]
fn a_derivation_of_an_earlier_release_can_be_read() {
    let json = r#"{"basis": "as_labelled", "rows": 700, "hateful": 300,
        "targets": {"block_precision": 0.95, "review": {"recall": 0.9}},
        "block": {"kind": "derived", "value": 0.93, "limited_by_block": false, "figures":
            {"rows": 80, "precision": 0.99, "precision_bound": 0.951, "recall": 0.26, "share": 0.11}},
        "review": {"kind": "none", "reason": {"kind": "no_sample"}}}"#;
    let derivation: ThresholdDerivation = serde_json::from_str(json).unwrap();
    assert!(derivation.block.value() == Some(0.93) && !derivation.block.is_provisional());
}

#[test]
fn an_unreachable_precision_reports_the_best_lower_bound() {
    let rows = vec![row(0.9, true, None); 20];
    let derivation = ThresholdDerivation::derive(&rows, TARGETS).unwrap();
    let ThresholdOutcome::None { reason } = derivation.block else {
        panic!("{:?}", derivation.block);
    };
    assert_eq!(
        reason.to_string(),
        "no threshold has a precision of 0.9 with 95 % confidence; the best lower bound is 0.881"
    );
    let nothing = ThresholdDerivation::derive(&[], TARGETS).unwrap();
    assert_eq!((nothing.block.value(), nothing.review.value()), (None, None));
}

#[test]
fn numbers_outside_their_range_are_errors() {
    let check = |rows: &[ThresholdRow], targets, expected: &str| {
        assert_eq!(
            ThresholdDerivation::derive(rows, targets).unwrap_err().to_string(),
            expected
        );
    };
    check(
        &[row(f64::NAN, true, None)],
        TARGETS,
        "row 0: probability is NaN, expected a number from 0 to 1",
    );
    check(
        &[row(0.5, true, Some(0.0))],
        TARGETS,
        "row 0: inclusion is 0, expected a number above 0 and at most 1",
    );
    let targets = ThresholdTargets {
        review: ReviewTarget::Share(1.5),
        ..TARGETS
    };
    check(
        &[],
        targets,
        "the target share is 1.5, expected a number above 0 and at most 1",
    );
}

fn rows() -> impl Strategy<Value = Vec<ThresholdRow>> {
    let inclusion = prop_oneof![Just(None), (1u8..=10).prop_map(|tenths| Some(f64::from(tenths) / 10.0))];
    let one = (0u8..=50, any::<bool>(), inclusion)
        .prop_map(|(step, hateful, inclusion)| row(f64::from(step) / 50.0, hateful || step > 40, inclusion));
    prop::collection::vec(one, 0..600)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(128))]

    #[test]
    fn the_thresholds_meet_their_targets(
        rows in rows(),
        block_precision in 0.05f64..=1.0,
        target in 0.05f64..=1.0,
        recall: bool,
    ) {
        let review = if recall { ReviewTarget::Recall(target) } else { ReviewTarget::Share(target) };
        let derivation = ThresholdDerivation::derive(&rows, ThresholdTargets { block_precision, review, provisional: false }).unwrap();
        if let (Some(review), Some(block)) = (derivation.review.value(), derivation.block.value()) {
            prop_assert!(review <= block);
        }
        // Computed again from the definition, over the rows that were used.
        let sampled = derivation.is_representative();
        let used: Vec<_> = rows.iter().filter(|row| !sampled || row.inclusion.is_some()).collect();
        let weight = |row: &ThresholdRow| if sampled { 1.0 / row.inclusion.unwrap_or(1.0) } else { 1.0 };
        let bound = |threshold: f64| {
            let above = used.iter().filter(|row| row.probability >= threshold);
            let effective = effective_rows(above.clone().map(|row| (weight(row), 1.0)));
            let sum: f64 = above.clone().map(|row| weight(row)).sum();
            let hateful: f64 = above.filter(|row| row.hateful).map(|row| weight(row)).sum();
            wilson_lower(hateful / sum, effective)
        };
        let precise = used.iter().map(|row| row.probability).filter(|&value| bound(value) >= block_precision);
        let lowest = precise.reduce(f64::min);
        prop_assert_eq!(derivation.block.value(), lowest);
        if let ThresholdOutcome::Derived { figures, limited_by_block, .. } = derivation.review {
            match review {
                ReviewTarget::Recall(target) => prop_assert!(figures.recall.unwrap() >= target - 1e-12),
                ReviewTarget::Share(target) => prop_assert!(limited_by_block || figures.share <= target + 1e-12),
            }
        }
        let json = serde_json::to_string(&derivation).unwrap();
        prop_assert_eq!(serde_json::from_str::<ThresholdDerivation>(&json).unwrap(), derivation);
    }
}
