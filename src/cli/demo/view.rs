//! The live view on a terminal, which redraws a few lines in place.

use std::fmt::Write as _;
use std::io::{self, Write};
use std::time::Duration;

use super::counter::{Count, DemoOutput};
use super::samples::sample;

/// The facts that the view shows in addition to the count.
pub(super) struct DemoFacts<'a> {
    pub brokers: &'a str,
    pub model: &'a str,
    pub produced: u64,
    pub elapsed: Duration,
    /// Recent number of comments per second.
    pub rate: f64,
}

/// A view that overwrites its previous picture.
#[derive(Debug, Default)]
pub(super) struct LiveView {
    lines: usize,
}

impl LiveView {
    /// Draws a picture on a terminal with the given number of columns. Longer lines are cut, because a wrapped line
    /// would take up two lines and the next picture would not cover it.
    pub fn draw(
        &mut self,
        facts: &DemoFacts<'_>,
        count: &Count,
        columns: usize,
        out: &mut dyn Write,
    ) -> io::Result<()> {
        let picture = picture(facts, count);
        // Move up to the first line of the previous picture. Each line is cleared before it is written.
        if self.lines > 0 {
            write!(out, "\x1b[{}A", self.lines)?;
        }
        for line in picture.lines() {
            let line: String = line.chars().take(columns).collect();
            writeln!(out, "\x1b[2K{line}")?;
        }
        self.lines = picture.lines().count();
        out.flush()
    }
}

fn picture(facts: &DemoFacts<'_>, count: &Count) -> String {
    let mut text = String::new();
    let seconds = facts.elapsed.as_secs();
    let action = |name: &str| count.actions.get(name).copied().unwrap_or(0);
    // Writing to a String cannot fail.
    let _ = writeln!(
        text,
        "moderatord demo   {:02}:{:02}   broker {}",
        seconds / 60,
        seconds % 60,
        facts.brokers
    );
    let _ = writeln!(text, "{}", facts.model);
    let _ = writeln!(
        text,
        "produced {}   decided {}   dead letters {}   duplicated {}   {:.0} comments/s",
        facts.produced, count.decided, count.dead_lettered, count.duplicated, facts.rate
    );
    let _ = writeln!(
        text,
        "allow {}   review {}   block {}   delete {}   latency p50 {:.0} ms, p99 {:.0} ms",
        action("allow"),
        action("review"),
        action("block"),
        action("delete"),
        count.latency_ms(0.5),
        count.latency_ms(0.99)
    );
    text.push('\n');
    for output in &count.latest {
        let _ = writeln!(text, "{}", line(output));
    }
    text
}

/// Formats one output. It may show the text, because it is one of the samples and not a user's comment.
pub(super) fn line(output: &DemoOutput) -> String {
    let number = output.key.strip_prefix('c').and_then(|number| number.parse().ok());
    let text = number.map_or("", |number| sample(number).text);
    let probability = output
        .probability
        .map_or_else(|| "     ".to_owned(), |probability| format!("{probability:.3}"));
    format!("  {:<11}  {probability}  {text}", output.action)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_picture_overwrites_the_previous_one() {
        let facts = DemoFacts {
            brokers: "127.0.0.1:9092",
            model: "a model",
            produced: 3,
            elapsed: Duration::from_secs(61),
            rate: 20.4,
        };
        let mut count = Count::default();
        count.decided = 1;
        count.actions.insert("allow".into(), 1);
        count.latest.push_back(DemoOutput {
            key: "c0".into(),
            action: "allow".into(),
            probability: Some(0.25),
        });
        let (mut view, mut out) = (LiveView::default(), Vec::new());
        view.draw(&facts, &count, 80, &mut out).unwrap();
        let once = String::from_utf8(out.clone()).unwrap().replace("\x1b[2K", "");
        insta::assert_snapshot!(once, @r"
        moderatord demo   01:01   broker 127.0.0.1:9092
        a model
        produced 3   decided 1   dead letters 0   duplicated 0   20 comments/s
        allow 1   review 0   block 0   delete 0   latency p50 0 ms, p99 0 ms

          allow        0.250  you look very nice today
        ");
        out.clear();
        view.draw(&facts, &count, 20, &mut out).unwrap();
        let again = String::from_utf8(out).unwrap();
        assert!(again.starts_with("\x1b[6A"));
        assert!(
            again
                .replace("\x1b[6A", "")
                .replace("\x1b[2K", "")
                .lines()
                .all(|line| line.len() <= 20)
        );
    }
}
