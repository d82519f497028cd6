//! Counts things in messages, so that no message speaks of "1 rows".

use std::fmt;

/// A number of things, which is shown with a noun in the singular or the plural.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Count(pub usize, pub &'static str);

impl fmt::Display for Count {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self(count, noun) = self;
        let ending = if *count == 1 { "" } else { "s" };
        write!(f, "{count} {noun}{ending}")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_one_thing_is_singular() {
        let shown = [0, 1, 2].map(|count| Count(count, "content id").to_string());
        assert_eq!(shown, ["0 content ids", "1 content id", "2 content ids"]);
    }
}
