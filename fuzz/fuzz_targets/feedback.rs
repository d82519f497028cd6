//! The decoder of labelled feedback: every number that it returns is in the documented range, and no error quotes a
//! text.

#![no_main]

use libfuzzer_sys::fuzz_target;
use moderatord::retrain::data::feedback::{FeedbackError, FeedbackRules, LatestLabels, decode};

fuzz_target!(|data: &[u8]| {
    let Some((&lenient, lines)) = data.split_first() else {
        return;
    };
    let mut latest = LatestLabels::default();
    // Several labels in one input, so that they can replace one another.
    for (position, line) in lines.split(|&byte| byte == b'\n').enumerate() {
        let rules = FeedbackRules {
            max_bytes: line.len(),
            lenient: lenient % 2 == 1,
        };
        match decode(line, position as u64, rules) {
            Ok(feedback) => {
                assert!((0.0..=1.0).contains(&feedback.hateful), "label {}", feedback.hateful);
                assert!(
                    feedback.weight > 0.0 && feedback.weight.is_finite(),
                    "weight {}",
                    feedback.weight
                );
                let inclusion = feedback.inclusion.unwrap_or(1.0);
                assert!(inclusion > 0.0 && inclusion <= 1.0, "inclusion {inclusion}");
                assert!((1.0 / f64::from(inclusion)).is_finite(), "inclusion {inclusion}");
                assert_eq!(feedback.position, position as u64);
                latest.insert(feedback);
            }
            Err(error) => check_error(&error),
        }
    }
});

/// Checks that an error consists of fixed words and numbers.
fn check_error(error: &FeedbackError) {
    match error {
        FeedbackError::NotJson
        | FeedbackError::DuplicateField
        | FeedbackError::TooLarge { .. }
        | FeedbackError::Missing(_) => {}
        FeedbackError::BrokenRow(_) => unreachable!("records are not rows of a table"),
        FeedbackError::Wrong { field, found, .. } => {
            let is_number = found.parse::<f64>().is_ok();
            let is_description = ["null", "a ", "an "].iter().any(|start| found.starts_with(start));
            assert!(is_number || is_description && found.len() < 40, "`{field}` is {found}");
        }
    }
}
