//! `moderatord score`: scores comments from the command line, a file or stdin, and prints one decision per line.

use std::fs::File;
use std::io::{self, IsTerminal, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::SystemTime;

use anyhow::{Context, bail};
use clap::Args;
use indicatif::{ProgressBar, ProgressStyle};

use super::input::{Entry, InputFile};
use super::table::Columns;
use super::{Exit, SettingsArgs, checked};
use crate::config::{InputConfig, InputFields};
use crate::decide::{CurrentJudge, Judge, JudgedModel, deleted};
use crate::message::{Comment, Decision, Op};
use crate::prompt::{Prompt, Prompter};
use crate::scorer::{Row, ScoreError, Scorer, comment_margin};
use crate::serving::LoadedModel;
use crate::stream::decode::{DecodeError, decode};

/// Maximum number of comments in a batch. It bounds memory even for comments without tokens, such as deletions.
const MAX_BATCH_COMMENTS: usize = 1024;

#[derive(Debug, Args)]
#[command(after_help = AFTER_HELP)]
pub(super) struct ScoreArgs {
    #[command(flatten)]
    settings: SettingsArgs,
    #[command(flatten)]
    source: ScoreSource,
}

#[derive(Debug, Args)]
#[group(required = true, multiple = false)]
struct ScoreSource {
    /// Text of a single comment
    #[arg(long)]
    text: Option<String>,
    /// File of comment events: one JSON object per line, or CSV with a column `text`; may be gzipped, and `-` is stdin
    #[arg(long, value_name = "FILE")]
    input: Option<PathBuf>,
}

const AFTER_HELP: &str = r#"Each line of the input is a comment event. The `input` section of the settings gives the location of
its fields:
  {"content_id": "c1", "community_id": "gardening", "text": "see you at the garden"}
Only `text` is required, and an event with "op": "delete" does not need it. In CSV, the first line
names the columns, and each column has the name of its field. Decisions are printed in input order.
If a line cannot be scored, its number and the reason are printed to stderr, and the exit code is 1.

Examples:
  moderatord score --model ./gemma-3-270m-it --text 'see you at the garden'
  moderatord score --config moderatord.toml --input comments.jsonl > decisions.jsonl
  kcat -C -b kafka:9092 -t comments -e | moderatord score --config moderatord.toml --input -"#;

pub(super) fn run(args: &ScoreArgs, out: &mut dyn Write, err: &mut dyn Write) -> anyhow::Result<Exit> {
    let config = args.settings.load()?;
    let LoadedModel {
        mut classifier,
        calibration,
        thresholds,
    } = checked::model(&config)?.loaded;
    let judged = JudgedModel {
        identity: classifier.identity().clone(),
        calibration,
        derived: thresholds,
        defaults: classifier.defaults().clone(),
    };
    let run = ScoreRun {
        judge: CurrentJudge::new(config.policy.clone(), judged).get(),
        prompter: classifier.prompter(),
        scorer: &mut classifier,
        max_tokens: config.batch.max_tokens.min(MAX_TOKENS),
        batch: LineBatch::default(),
        unscored: 0,
        unread: 0,
        progress: ProgressBar::hidden(),
        out,
        err,
    };
    match &args.source {
        ScoreSource { text: Some(text), .. } => run.score_text(text),
        ScoreSource { input: Some(path), .. } => run.score_input(path, &config.input),
        // clap requires one of the two.
        ScoreSource { .. } => Ok(Exit::Usage),
    }
}

/// Maximum number of own tokens in a batch. With larger batches, a slow device would print nothing for a long time.
const MAX_TOKENS: usize = 4096;

/// The state of one run of the command.
struct ScoreRun<'a> {
    judge: Arc<Judge>,
    prompter: Arc<Prompter>,
    scorer: &'a mut dyn Scorer,
    max_tokens: usize,
    batch: LineBatch,
    unscored: usize,
    /// Those of the lines that could not be scored because they could not be read.
    unread: usize,
    progress: ProgressBar,
    out: &'a mut dyn Write,
    err: &'a mut dyn Write,
}

/// Comments that will be scored together, in input order, with their line numbers.
#[derive(Default)]
struct LineBatch {
    comments: Vec<(u64, Comment, Prompt)>,
    tokens: usize,
}

impl ScoreRun<'_> {
    fn score_text(mut self, text: &str) -> anyhow::Result<Exit> {
        let comment = Comment {
            event_id: None,
            content_id: None,
            revision: None,
            op: Op::Create,
            community_id: None,
            text: text.to_owned(),
            replaced_surrogates: 0,
        };
        self.add(1, comment)?;
        self.finish()
    }

    fn score_input(mut self, path: &Path, input: &InputConfig) -> anyhow::Result<Exit> {
        let columns = Columns::of_comments(&input.fields);
        let mut progress = ProgressBar::hidden();
        let mut file = InputFile::open(path, &columns, |file| {
            progress = progress_bar(file);
            progress.clone()
        })?;
        self.progress = progress;
        let mut fields = input.fields.clone();
        if file.is_table() {
            fields = InputFields {
                ops: fields.ops,
                ..InputFields::default()
            };
        }
        if let Some(note) = file.note() {
            writeln!(self.err, "{note}").context("cannot write to stderr")?;
        }
        let mut lines = 0;
        loop {
            // The next read may block, so write the decisions for all complete lines first.
            if !file.has_buffered() {
                self.score_batch()?;
            }
            let Some((number, entry)) = file.next(input.max_bytes)? else {
                break;
            };
            lines += 1;
            let comment = match entry {
                Entry::Json(json) => decode(&json, &[], &fields, input.max_bytes).map_err(|error| error.to_string()),
                Entry::TooLong(bytes) => {
                    let max_bytes = input.max_bytes;
                    Err(DecodeError::TooLarge { bytes, max_bytes }.to_string())
                }
                Entry::Refused(reason) => Err(reason),
            };
            match comment {
                Ok(comment) => self.add(number, comment)?,
                Err(reason) => {
                    self.unread += 1;
                    self.report_unscored(number, &reason)?;
                }
            }
        }
        if lines > 0 && self.unread == lines {
            self.progress.finish_and_clear();
            bail!("{}", file.nothing_read(lines));
        }
        self.finish()
    }

    fn add(&mut self, number: u64, comment: Comment) -> anyhow::Result<()> {
        let prompt = match comment.op {
            Op::Create | Op::Edit => self.prompter.encode(&comment.text),
            Op::Delete => Ok(Prompt::default()),
        };
        let prompt = match prompt {
            Ok(prompt) => prompt,
            Err(error) => return self.report_unscored(number, &error),
        };
        let tokens: usize = prompt.rows.iter().map(Row::own_tokens).sum();
        if !self.batch.comments.is_empty() && self.batch.tokens + tokens > self.max_tokens {
            self.score_batch()?;
        }
        self.batch.tokens += tokens;
        self.batch.comments.push((number, comment, prompt));
        if self.batch.comments.len() == MAX_BATCH_COMMENTS {
            self.score_batch()?;
        }
        Ok(())
    }

    /// Scores the batch and writes its decisions.
    fn score_batch(&mut self) -> anyhow::Result<()> {
        let LineBatch { comments, .. } = std::mem::take(&mut self.batch);
        if comments.is_empty() {
            return Ok(());
        }
        match self.decisions(&comments) {
            Ok(decisions) => self.write(&decisions)?,
            // Score each comment alone to find the ones that fail.
            Err(_) if comments.len() > 1 => {
                for comment in comments {
                    match self.decisions(std::slice::from_ref(&comment)) {
                        Ok(decisions) => self.write(&decisions)?,
                        Err(error) => self.report_unscored(comment.0, &error)?,
                    }
                }
            }
            Err(error) => self.report_unscored(comments[0].0, &error)?,
        }
        Ok(())
    }

    fn decisions(&mut self, comments: &[(u64, Comment, Prompt)]) -> Result<Vec<Decision>, ScoreError> {
        let rows: Vec<Row> = comments
            .iter()
            .flat_map(|(_, _, prompt)| &prompt.rows)
            .cloned()
            .collect();
        let margins = if rows.is_empty() {
            Vec::new()
        } else {
            self.scorer.score(&rows)?
        };
        let (mut margins, now) = (margins.into_iter(), SystemTime::now());
        let decide = |(_, comment, prompt): &(u64, Comment, Prompt)| match comment_margin(
            margins.by_ref().take(prompt.rows.len()),
            prompt.facts(),
        ) {
            None => deleted(comment, None),
            Some(scored) => self.judge.decide(comment, scored, None, now),
        };
        Ok(comments.iter().map(decide).collect())
    }

    fn write(&mut self, decisions: &[Decision]) -> anyhow::Result<()> {
        let mut lines = Vec::new();
        for decision in decisions {
            serde_json::to_writer(&mut lines, decision)?;
            lines.push(b'\n');
        }
        // Suspended so that the progress bar and the decisions do not mix on a terminal.
        self.progress
            .suspend(|| self.out.write_all(&lines).and_then(|()| self.out.flush()))
            .context("cannot write decisions")
    }

    fn report_unscored(&mut self, number: u64, error: &dyn std::fmt::Display) -> anyhow::Result<()> {
        self.unscored += 1;
        self.progress
            .suspend(|| writeln!(self.err, "line {number}: {error}"))
            .context("cannot write to stderr")
    }

    fn finish(mut self) -> anyhow::Result<Exit> {
        self.score_batch()?;
        self.progress.finish_and_clear();
        if self.unscored == 0 {
            return Ok(Exit::Success);
        }
        let lines = if self.unscored == 1 { "line" } else { "lines" };
        writeln!(self.err, "moderatord: {} {lines} could not be scored", self.unscored)
            .context("cannot write to stderr")?;
        Ok(Exit::Failure)
    }
}

/// Returns a progress bar over the bytes of the file, which is hidden if stderr is not a terminal.
fn progress_bar(file: &File) -> ProgressBar {
    let bytes = file.metadata().map(|metadata| metadata.len()).unwrap_or_default();
    if bytes == 0 || !io::stderr().is_terminal() {
        return ProgressBar::hidden();
    }
    let style = ProgressStyle::with_template("{wide_bar} {bytes}/{total_bytes} {bytes_per_sec} {eta}")
        .unwrap_or_else(|_| ProgressStyle::default_bar());
    ProgressBar::new(bytes).with_style(style)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::classifier::Classifier;
    use crate::config::{Config, PolicyConfig, Sources};
    use crate::decide::{Calibration, Policy};

    /// Fails if a batch contains a row with exactly this many own tokens.
    struct FailsOnOwnTokens(usize);

    impl Scorer for FailsOnOwnTokens {
        fn score(&mut self, rows: &[Row]) -> Result<Vec<f32>, ScoreError> {
            match rows.iter().position(|row| row.own_tokens() == self.0) {
                Some(row) => Err(ScoreError::NotFinite { row, margin: f32::NAN }),
                None => Ok(vec![1.0; rows.len()]),
            }
        }
    }

    #[test]
    fn a_comment_that_cannot_be_scored_does_not_affect_the_rest_of_its_batch() {
        let sources = Sources {
            flags: vec![("model.path", "tests/fixtures/gemma3".to_owned(), "--model")],
            ..Sources::default()
        };
        let config = Config::load(&sources).unwrap();
        let classifier = Classifier::load(&config.model, &config.prompt).unwrap();
        let prompter = classifier.prompter();
        let texts = ["hello", "a much longer word of thanks", "good bye"];
        let failing_tokens = prompter.encode(texts[1]).unwrap().rows[0].own_tokens();
        let (mut out, mut err) = (Vec::new(), Vec::new());
        let mut run = ScoreRun {
            judge: Arc::new(Judge::new(
                Policy::new(
                    &PolicyConfig {
                        from_adapter: false,
                        not_in_scope: Default::default(),
                        thresholds: Default::default(),
                        communities: Default::default(),
                    },
                    classifier.defaults(),
                ),
                Calibration::Identity,
                classifier.identity().clone(),
            )),
            prompter,
            scorer: &mut FailsOnOwnTokens(failing_tokens),
            max_tokens: config.batch.max_tokens,
            batch: LineBatch::default(),
            unscored: 0,
            unread: 0,
            progress: ProgressBar::hidden(),
            out: &mut out,
            err: &mut err,
        };
        for (number, text) in (1..).zip(texts) {
            let event = serde_json::json!({ "content_id": number, "text": text }).to_string();
            let comment = decode(event.as_bytes(), &[], &config.input.fields, 1000).unwrap();
            run.add(number, comment).unwrap();
        }
        assert_eq!(run.finish().unwrap(), Exit::Failure);
        let ids: Vec<Decision> = out
            .split(|&byte| byte == b'\n')
            .filter_map(|line| serde_json::from_slice(line).ok())
            .collect();
        let ids: Vec<_> = ids.iter().map(|decision| decision.content_id.as_deref()).collect();
        assert_eq!(ids, [Some("1"), Some("3")]);
        assert_eq!(
            String::from_utf8(err).unwrap(),
            "line 2: row 0 has margin NaN, expected a finite number\nmoderatord: 1 line could not be scored\n"
        );
    }
}
