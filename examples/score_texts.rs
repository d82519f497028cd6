//! Scores texts with the library, without Kafka: prints the probability that each one is hateful.
//!
//!     cargo run --release --example score_texts -- 'you look very nice today' 'see you at the garden'
//!
//! With the default settings it uses the small model that is bundled with the library. To use another one, set
//! `MODERATORD__MODEL__PATH` to the folder of a checkpoint, and `MODERATORD__MODEL__ADAPTER` to that of a LoRA adapter.

#![allow(clippy::print_stdout, reason = "an example prints its results")]

use moderatord::classifier::Classifier;
use moderatord::config::{Config, Sources};
use moderatord::decide::Calibration;
use moderatord::message::CommentMargin;
use moderatord::scorer::{Row, Scorer, comment_margin};

fn main() -> anyhow::Result<()> {
    let texts: Vec<String> = std::env::args().skip(1).collect();
    anyhow::ensure!(!texts.is_empty(), "expected at least one text as an argument");

    let config = Config::load(&Sources::process(None))?;
    let mut classifier = Classifier::load(&config.model, &config.prompt)?;
    let prompter = classifier.prompter();

    // A long text is cut into windows, each of which is a row. All rows are scored in one micro-batch.
    let prompts = texts.iter().map(|text| prompter.encode(text));
    let prompts = prompts.collect::<Result<Vec<_>, _>>()?;
    let rows: Vec<Row> = prompts.iter().flat_map(|prompt| prompt.rows.clone()).collect();
    let mut margins = classifier.score(&rows)?.into_iter();

    for (text, prompt) in texts.iter().zip(&prompts) {
        // The most hateful window decides.
        if let Some(CommentMargin { margin, .. }) =
            comment_margin(margins.by_ref().take(prompt.rows.len()), prompt.facts())
        {
            println!("{:.3}  {text}", Calibration::Identity.probability(margin));
        }
    }
    Ok(())
}
