//! The sample comments, written for this purpose and mild. Most are kind or neutral, a few are rude, and a few are
//! hateful. A few events cannot be parsed, so that the demo shows dead letters as well.

use serde_json::json;

/// The communities to which the comments are assigned.
const COMMUNITIES: [&str; 4] = ["gardening", "cooking", "cycling", "chess"];

/// Comments that no moderator would remove.
const FRIENDLY: [&str; 19] = [
    "you look very nice today",
    "See you at the garden on Sunday?",
    "Thanks, that was really helpful!",
    "I planted two rows of beans and the first leaves have come up already.",
    "The soup needs more salt, otherwise lovely.",
    "Has anyone tried the new bike path along the river?",
    "e4 is still the best first move, change my mind",
    "Your tomatoes look amazing, what soil do you use?",
    "I disagree, but I see where you are coming from.",
    "Happy birthday! 🎉 Hope you have a wonderful day.",
    "Can somebody explain the en passant rule to me once more?",
    "I finally fixed the squeak, it was the chain after all.",
    "Great photo, the light is beautiful.",
    "Does it work with oat milk too?",
    "My grandmother made it with nutmeg, try that.",
    "Lost my keys somewhere near the station, please tell me if you find them.",
    "The knight fork on move twelve was brilliant.",
    "Who left the gate open again? The rabbits ate everything!",
    "Well played, see you in the next round.",
];

/// Rude comments that do not attack anyone's origin, religion or identity.
const RUDE: [&str; 8] = [
    "That was a silly thing to say, honestly.",
    "What a boring match, I fell asleep twice.",
    "Nobody asked for your opinion, go away.",
    "This is the worst recipe I have ever tried, shame on you.",
    "You lot from the other club are all cheats and you know it.",
    "Get lost, we do not want your kind of gardener here.",
    "Stop spamming the thread with the same question.",
    "You are such a clown, but a funny one.",
];

/// Comments that attack people because of their origin, religion, sex or orientation.
const HATEFUL: [&str; 4] = [
    "Immigrants are ruining our town, every one of them should be sent away.",
    "I cannot stand Muslims, none of them belongs in this club.",
    "Women are too stupid for chess and should not be allowed to play.",
    "Gay people are not welcome here, keep them away from our children.",
];

/// An input event: its key, its value, and the text that the view shows for it.
pub(super) struct SampleComment {
    pub key: String,
    pub value: Option<Vec<u8>>,
    pub text: &'static str,
}

/// Returns the event with the given number, which is the same in every run.
pub(super) fn sample(number: u64) -> SampleComment {
    let turn = |turn: u64, count: usize| usize::try_from(turn % count as u64).unwrap_or(0);
    let key = format!("c{number}");
    let (value, text) = match number % 100 {
        40 => (Some(b"this is not JSON".to_vec()), "(not JSON)"),
        60 => (Some(br#"{"content_id":"no-text"}"#.to_vec()), "(no text)"),
        80 => (None, "(forgotten)"),
        90 => (
            Some(json!({ "content_id": key, "op": "delete" }).to_string().into_bytes()),
            "(deleted)",
        ),
        _ => {
            let text = match number % 20 {
                7 => HATEFUL[turn(number / 20, HATEFUL.len())],
                3 | 13 => RUDE[turn(number / 10, RUDE.len())],
                _ => FRIENDLY[turn(number, FRIENDLY.len())],
            };
            let event = json!({
                "event_id": format!("e{number}"),
                "content_id": key,
                "community_id": COMMUNITIES[turn(number / 3, COMMUNITIES.len())],
                "text": text,
            });
            (Some(event.to_string().into_bytes()), text)
        }
    };
    SampleComment { key, value, text }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::classifier::Classifier;
    use crate::classifier::tolerance::QUANTISED_PROBABILITY;
    use crate::config::{Config, ModelConfig, Quantize, Sources};
    use crate::scorer::Scorer;

    #[test]
    fn every_sample_appears_and_events_are_reproducible() {
        let shown: std::collections::BTreeSet<&str> = (0..400).map(|number| sample(number).text).collect();
        assert_eq!(shown.len(), FRIENDLY.len() + RUDE.len() + HATEFUL.len() + 4);
        assert_eq!(sample(7).value, sample(7).value);
    }

    /// Returns the probabilities that the bundled model gives to texts.
    fn probabilities(classifier: &mut Classifier, texts: &[&str]) -> Vec<f32> {
        let prompter = classifier.prompter();
        let rows = texts.iter().map(|text| prompter.encode(text).unwrap().rows.remove(0));
        let margins = classifier.score(&rows.collect::<Vec<_>>()).unwrap();
        margins.iter().map(|margin| 1.0 / (1.0 + (-margin).exp())).collect()
    }

    #[test]
    fn the_bundled_model_scores_every_hateful_sample_above_every_friendly_one() {
        let config = Config::load(&Sources::default()).unwrap();
        let mut classifier = Classifier::load(&config.model, &config.prompt).unwrap();
        let friendly = probabilities(&mut classifier, &FRIENDLY);
        let hateful = probabilities(&mut classifier, &HATEFUL);
        let highest = friendly.iter().copied().fold(0.0, f32::max);
        let lowest = hateful.iter().copied().fold(1.0, f32::min);
        assert!(
            lowest > 0.5 && highest < 0.5,
            "friendly up to {highest}, hateful from {lowest}"
        );
        assert!(friendly[0] < 0.1, "`{}` has {}", FRIENDLY[0], friendly[0]);
    }

    #[test]
    fn eight_bit_weights_hardly_change_the_bundled_models_probabilities() {
        let config = Config::load(&Sources::default()).unwrap();
        let texts = [&FRIENDLY[..], &RUDE[..], &HATEFUL[..]].concat();
        let [exact, quantised] = [Quantize::None, Quantize::Int8].map(|quantize| {
            let model = ModelConfig {
                quantize,
                ..config.model.clone()
            };
            let mut classifier = Classifier::load(&model, &config.prompt).unwrap();
            probabilities(&mut classifier, &texts)
        });
        assert_ne!(exact, quantised);
        for ((text, exact), quantised) in texts.iter().zip(exact).zip(quantised) {
            let difference = (exact - quantised).abs();
            assert!(difference <= QUANTISED_PROBABILITY, "`{text}`: {difference}");
        }
    }
}
