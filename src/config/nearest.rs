//! Suggests the key that a misspelt key most likely meant.

/// The name of `names` that `name` most likely meant.
pub(super) fn nearest<'a>(name: &str, names: impl Iterator<Item = &'a str>) -> Option<&'a str> {
    names
        .map(|candidate| (edits(name, candidate), candidate))
        // A third of the letters wrong is still a typo; more is another word.
        .filter(|&(distance, candidate)| 3 * distance <= candidate.len().max(name.len()))
        .min()
        .map(|(_, candidate)| candidate)
}

/// Letters to insert, delete or replace to turn `from` into `to`.
fn edits(from: &str, to: &str) -> usize {
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
    fn a_typo_finds_its_name_and_another_word_finds_none() {
        let check = |name: &str, expected: Option<&str>| {
            let names = ["batch.max_tokens", "batch.linger", "model.path"];
            assert_eq!(nearest(name, names.into_iter()), expected, "{name}");
        };
        check("batch.max_token", Some("batch.max_tokens"));
        check("model.pth", Some("model.path"));
        check("modelpath", Some("model.path"));
        check("registry.url", None);
        check("", None);
    }
}
