//! Suggests a correction for a misspelt key.

/// Returns the candidate that `name` is most likely a misspelling of, or `None` if none is close enough.
pub(super) fn nearest<'a>(name: &str, candidates: impl Iterator<Item = &'a str>) -> Option<&'a str> {
    candidates
        .map(|candidate| (edit_distance(name, candidate), candidate))
        // With more than a third of its letters wrong, a key is unlikely to be a typo of the candidate.
        .filter(|&(distance, candidate)| 3 * distance <= candidate.len().max(name.len()))
        .min()
        .map(|(_, candidate)| candidate)
}

/// Returns the Levenshtein distance in bytes: how many to insert, delete or replace to turn `from` into `to`.
fn edit_distance(from: &str, to: &str) -> usize {
    let mut row: Vec<usize> = (0..=to.len()).collect();
    for (i, a) in from.bytes().enumerate() {
        let mut diagonal = row[0];
        row[0] = i + 1;
        for (j, b) in to.bytes().enumerate() {
            let replaced = diagonal + usize::from(a != b);
            diagonal = row[j + 1];
            row[j + 1] = replaced.min(row[j] + 1).min(diagonal + 1);
        }
    }
    row[to.len()]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_typo_is_corrected_and_another_word_is_not() {
        let check = |name: &str, expected: Option<&str>| {
            let candidates = ["batch.max_tokens", "batch.linger", "model.path"];
            assert_eq!(nearest(name, candidates.into_iter()), expected, "{name}");
        };
        check("batch.max_token", Some("batch.max_tokens"));
        check("model.pth", Some("model.path"));
        check("modelpath", Some("model.path"));
        check("registry.url", None);
        check("", None);
    }
}
