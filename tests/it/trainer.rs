//! Tests the training loop on a tiny base model: it learns, is deterministic, stops early, and writes an adapter that
//! serves the margins that it had in training.

use crate::common::{fixture, model_config, prompt_config};
use moderatord::classifier::Classifier;
use moderatord::classifier::tolerance::TRAINING_F32;
use moderatord::config::{Loss, ModelConfig, Projection, PromptConfig, Quantize, Template};
use moderatord::model::device::Placement;
use moderatord::model::files::checkpoint::Checkpoint;
use moderatord::model::forward::gemma::Gemma;
use moderatord::model::forward::linear::LoraMode;
use moderatord::model::forward::load::LoadOptions;
use moderatord::prompt::Prompter;
use moderatord::retrain::train::peft;
use moderatord::retrain::train::trainer::{
    FrameIds, TrainError, TrainerConfig, TrainingOutcome, TrainingProgress, TrainingRow, margins, train,
};
use moderatord::scorer::Scorer;

const FAMILY: &str = "gemma3";

fn base() -> Gemma {
    let checkpoint = Checkpoint::open(&fixture(FAMILY)).unwrap();
    Gemma::load(
        &checkpoint,
        None,
        LoadOptions {
            lora: LoraMode::Unmerged,
            quantize: Quantize::None,
            placement: Placement::cpu(),
            for_training: true,
        },
    )
    .unwrap()
}

fn prompter() -> Prompter {
    prompter_of(&prompt_config())
}

fn prompter_of(prompt: &PromptConfig) -> Prompter {
    let path = fixture(FAMILY).join("tokenizer.json");
    Prompter::new(&path, &std::fs::read(&path).unwrap(), prompt, 1024, 8192).unwrap()
}

/// Returns the prompt of a chat model, whose labels stand behind a control token and a line break.
fn chat() -> PromptConfig {
    let template = Template {
        head: "<start_of_turn>user\nIs this fine? ".to_owned(),
        tail: "<end_of_turn>\n<start_of_turn>model\n".to_owned(),
    };
    PromptConfig {
        template: Some(template),
        ..prompt_config()
    }
}

fn frame_ids(prompter: &Prompter) -> FrameIds<'_> {
    FrameIds {
        prefix: prompter.prefix(),
        labels: prompter.label_ids(),
        eos: 1,
    }
}

/// Returns rows that follow a simple rule: texts about rain are "hateful".
fn rows(prompter: &Prompter, from: usize, count: usize) -> Vec<TrainingRow> {
    let things = ["river", "house", "garden", "train", "captain", "soup", "street"];
    let row = |index: usize| {
        let rain = index.is_multiple_of(2);
        let weather = if rain { "rain rain rain" } else { "sunny days" };
        let text = format!("{} and {weather} by the {}", things[index % 7], things[index / 7 % 7]);
        let hateful = if rain { 1.0 } else { 0.0 };
        TrainingRow {
            row: prompter.encode(&text).unwrap().rows.remove(0),
            hateful,
            weight: 1.0,
        }
    };
    (from..from + count).map(row).collect()
}

fn config() -> TrainerConfig {
    TrainerConfig {
        loss: Loss::Label,
        learning_rate: 1e-2,
        epochs: 6,
        targets: vec![Projection::Q, Projection::V, Projection::Down],
        ..TrainerConfig::default()
    }
}

fn run(config: &TrainerConfig, progress: &mut dyn FnMut(TrainingProgress)) -> Result<TrainingOutcome, TrainError> {
    run_with(&prompt_config(), config, progress)
}

fn run_with(
    prompt: &PromptConfig,
    config: &TrainerConfig,
    progress: &mut dyn FnMut(TrainingProgress),
) -> Result<TrainingOutcome, TrainError> {
    let prompter = prompter_of(prompt);
    let ids = frame_ids(&prompter);
    train(
        base(),
        ids,
        config,
        &rows(&prompter, 0, 40),
        &rows(&prompter, 40, 10),
        progress,
    )
}

#[test]
fn training_learns_a_rule_and_reports_its_progress() {
    let mut reports = Vec::new();
    let trained = run(&config(), &mut |progress| reports.push(progress)).unwrap();
    check_that_a_rule_is_learned(&prompt_config(), &trained, &reports);
}

/// The loss is read where the labels stand in a template: behind its last token.
#[test]
fn training_learns_a_rule_in_a_template() {
    for loss in [Loss::Label, Loss::Pair, Loss::Sequence] {
        let mut reports = Vec::new();
        let config = TrainerConfig { loss, ..config() };
        let trained = run_with(&chat(), &config, &mut |progress| reports.push(progress)).unwrap();
        check_that_a_rule_is_learned(&chat(), &trained, &reports);
    }
}

fn check_that_a_rule_is_learned(prompt: &PromptConfig, trained: &TrainingOutcome, reports: &[TrainingProgress]) {
    let validation: Vec<f64> = reports
        .iter()
        .filter_map(|progress| match progress {
            TrainingProgress::Epoch { validation, .. } => Some(*validation),
            TrainingProgress::Step { .. } => None,
        })
        .collect();
    assert!(
        trained.validation < 0.3 && trained.validation < validation[0],
        "{validation:?}"
    );
    let steps = reports
        .iter()
        .filter(|progress| matches!(progress, TrainingProgress::Step { .. }))
        .count();
    assert_eq!(steps, 5 * trained.epochs);
    let prompter = prompter_of(prompt);
    let ids = frame_ids(&prompter);
    let unseen = rows(&prompter, 50, 20);
    let correct = margins(&trained.trainable, ids, &unseen)
        .unwrap()
        .iter()
        .zip(&unseen)
        .filter(|(margin, row)| (**margin > 0.0) == (row.hateful > 0.5))
        .count();
    assert!(correct >= 18, "{correct} of 20 rows are classified correctly");
}

#[test]
fn equal_seeds_give_equal_bytes_and_different_seeds_do_not() {
    let short = TrainerConfig { epochs: 1, ..config() };
    let bytes = |config: &TrainerConfig| {
        let trained = run(config, &mut |_| ()).unwrap();
        peft::write(trained.trainable.variables(), config, "base").unwrap()
    };
    let first = bytes(&short);
    assert!(first == bytes(&short), "two runs with the same seed differ");
    assert!(first.weights != bytes(&TrainerConfig { seed: 2, ..short }).weights);
}

/// Training and serving agree: the adapter, written and loaded, gives the margins that it had in training.
#[test]
fn a_trained_adapter_serves_the_margins_it_had_in_training() {
    for (use_rslora, prompt) in [(false, prompt_config()), (true, prompt_config()), (false, chat())] {
        let config = TrainerConfig {
            epochs: 1,
            use_rslora,
            ..config()
        };
        let trained = run_with(&prompt, &config, &mut |_| ()).unwrap();
        let folder = tempfile::tempdir().unwrap();
        let files = peft::write(trained.trainable.variables(), &config, "base").unwrap();
        std::fs::write(folder.path().join("adapter_config.json"), files.config).unwrap();
        std::fs::write(folder.path().join("adapter_model.safetensors"), files.weights).unwrap();
        let prompter = prompter_of(&prompt);
        let ids = frame_ids(&prompter);
        let rows = rows(&prompter, 0, 12);
        let expected = margins(&trained.trainable, ids, &rows).unwrap();
        let model = ModelConfig {
            adapter: Some(folder.path().to_owned()),
            ..model_config(FAMILY)
        };
        for mode in [LoraMode::Merged, LoraMode::Unmerged] {
            let mut served = Classifier::load_with(&model, &prompt, mode).unwrap();
            let served = served
                .score(&rows.iter().map(|row| row.row.clone()).collect::<Vec<_>>())
                .unwrap();
            for (served, expected) in served.iter().zip(&expected) {
                assert!(
                    (f64::from(*served) - expected).abs() <= f64::from(TRAINING_F32),
                    "{mode:?}: {served}, expected {expected} as in training"
                );
            }
        }
    }
}

#[test]
fn a_loss_that_is_not_a_number_stops_training_with_an_error() {
    let prompter = prompter();
    let ids = frame_ids(&prompter);
    let mut training = rows(&prompter, 0, 40);
    training[17].hateful = f32::NAN;
    let (mut steps, mut last) = (0, 0.0);
    let outcome = train(
        base(),
        ids,
        &config(),
        &training,
        &rows(&prompter, 40, 10),
        &mut |progress| {
            if let TrainingProgress::Step { loss, .. } = progress {
                (steps, last) = (steps + 1, loss);
            }
        },
    );
    let error = outcome.err().unwrap();
    let TrainError::Diverged {
        step,
        loss,
        learning_rate,
        last_good,
    } = &error
    else {
        panic!("{error}")
    };
    assert_eq!(*step, steps + 1, "the step that failed is reported as completed");
    assert!(loss.is_nan() && *learning_rate > 0.0, "{error}");
    assert!(steps == 0 || last_good.is_finite() && last.is_finite(), "{error}");
    assert!(error.to_string().contains("training diverged at step"), "{error}");
}

#[test]
fn training_stops_when_the_validation_loss_stops_improving() {
    // The validation rows have the opposite labels of the training rows, so that the first epoch is the best.
    let prompter = prompter();
    let ids = frame_ids(&prompter);
    let mut opposite = rows(&prompter, 40, 10);
    opposite.iter_mut().for_each(|row| row.hateful = 1.0 - row.hateful);
    let config = TrainerConfig {
        epochs: 12,
        patience: 2,
        ..config()
    };
    let trained = train(base(), ids, &config, &rows(&prompter, 0, 40), &opposite, &mut |_| ()).unwrap();
    assert!(trained.epochs < 12, "{} epochs", trained.epochs);
}

#[test]
fn an_empty_part_is_an_error() {
    let prompter = prompter();
    let ids = frame_ids(&prompter);
    let some = rows(&prompter, 0, 4);
    for (training, validation, part) in [(&[][..], &some[..], "training"), (&some[..], &[][..], "validation")] {
        let error = train(base(), ids, &config(), training, validation, &mut |_| ())
            .err()
            .unwrap();
        assert_eq!(error.to_string(), format!("the {part} part has no rows"));
    }
}
