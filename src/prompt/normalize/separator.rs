//! Breaks up literal spellings of the frame's separator.

use std::borrow::Cow;

/// The separator of a frame.
#[derive(Debug, Clone)]
pub(super) struct Separator {
    /// Without surrounding white space, in ASCII lower case.
    core: String,
}

impl Separator {
    /// Creates the separator of a frame. An empty one is in no text.
    pub(super) fn new(separator: &str) -> Self {
        Self {
            core: separator.trim().to_ascii_lowercase(),
        }
    }

    /// Puts a space after the first character of each separator, ignoring ASCII case.
    pub(super) fn broken_up<'a>(&self, text: Cow<'a, str>) -> Cow<'a, str> {
        let lower = text.to_ascii_lowercase();
        if self.core.is_empty() || !lower.contains(&self.core) {
            return text;
        }
        let first = self.core.chars().next().map_or(1, char::len_utf8);
        let mut broken = String::with_capacity(text.len() + 8);
        let mut at = 0;
        while let Some(found) = lower[at..].find(&self.core) {
            broken.push_str(&text[at..at + found + first]);
            broken.push(' ');
            at += found + first;
        }
        broken.push_str(&text[at..]);
        Cow::Owned(self.without_separator(broken))
    }

    /// Removes the first separator of a text until there is none, ignoring ASCII case.
    ///
    /// If the separator itself contains a space, breaking up one occurrence can complete another.
    fn without_separator(&self, text: String) -> String {
        if !text.to_ascii_lowercase().contains(&self.core) {
            return text;
        }
        // The first separator is the one that ends first. Removing each as soon as it ends takes linear time.
        let mut kept = String::with_capacity(text.len());
        for char in text.chars() {
            kept.push(char);
            let start = kept.len().saturating_sub(self.core.len());
            if kept.as_bytes()[start..].eq_ignore_ascii_case(self.core.as_bytes()) {
                kept.truncate(start);
            }
        }
        kept
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn literal_separators_are_broken_up() {
        let broken = |separator: &str, text: &str| Separator::new(separator).broken_up(text.into()).into_owned();
        let check = |text: &str, expected: &str| assert_eq!(broken("<separator>", text), expected, "{text:?}");
        check("a<separator>Text:b", "a< separator>Text:b");
        check("a<SEPARator>b<separator>", "a< SEPARator>b< separator>");
        check("<separ<separator>ator>", "<separ< separator>ator>");
        assert_eq!(broken("\n##\n", "a###b"), "a# # #b");
        assert_eq!(broken("aa a", "aaa a").matches("aa a").count(), 0);
        // Each of the many separators that breaking up completes is removed in one pass over the text.
        assert!(!broken("aa a", &"aaa a".repeat(180_000)).contains("aa a"));
    }

    proptest! {
        /// Removing in one pass gives what removing the first separator again and again gives.
        #[test]
        fn the_first_separator_is_removed_until_there_is_none(text in "[aAb ]{0,30}", separator in "[ab][ab ]{0,3}[ab]") {
            let mut expected = text.clone();
            while let Some(found) = expected.to_ascii_lowercase().find(&separator) {
                expected.replace_range(found..found + separator.len(), "");
            }
            prop_assert_eq!(Separator::new(&separator).without_separator(text), expected);
        }
    }
}
