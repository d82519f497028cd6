//! Comments to watch: our own words, mild ones. A few are rude, none is hateful; a few events cannot be
//! read, so that dead letters are seen as well.

use serde_json::json;

/// Communities that they are posted in.
const COMMUNITIES: [&str; 4] = ["gardening", "cooking", "cycling", "chess"];

/// What people write.
const TEXTS: [&str; 28] = [
    "you look very nice today",
    "See you at the garden on Sunday?",
    "Thanks, that was really helpful!",
    "I planted two rows of beans and the first leaves have come up already.",
    "The soup needs more salt, otherwise lovely.",
    "Has anyone tried the new bike path along the river?",
    "e4 is still the best first move, change my mind",
    "Your tomatoes look amazing, what soil do you use?",
    "That was a silly thing to say, honestly.",
    "I disagree, but I see where you are coming from.",
    "What a boring match, I fell asleep twice.",
    "Nobody asked for your opinion, go away.",
    "People like you should not be allowed near a kitchen.",
    "This is the worst recipe I have ever tried, shame on you.",
    "You lot from the other club are all cheats and you know it.",
    "Happy birthday! 🎉 Hope you have a wonderful day.",
    "Can somebody explain the en passant rule to me once more?",
    "I finally fixed the squeak, it was the chain after all.",
    "Great photo, the light is beautiful.",
    "Get lost, we do not want your kind of gardener here.",
    "Does it work with oat milk too?",
    "My grandmother made it with nutmeg, try that.",
    "Stop spamming the thread with the same question.",
    "Lost my keys somewhere near the station, please tell me if you find them.",
    "You are such a clown, but a funny one.",
    "The knight fork on move twelve was brilliant.",
    "Who left the gate open again? The rabbits ate everything!",
    "Well played, see you in the next round.",
];

/// One input event: key, value, and what to call it on screen.
pub(super) struct Sample {
    pub key: String,
    pub value: Option<Vec<u8>>,
    pub text: &'static str,
}

/// The event of a number; the same on every run.
pub(super) fn sample(number: u64) -> Sample {
    let pick = |count: usize, stride: u64| usize::try_from(number.wrapping_mul(stride) % count as u64).unwrap_or(0);
    let key = format!("c{number}");
    let (value, text) = match number % 100 {
        40 => (Some(b"this is no JSON".to_vec()), "(no JSON)"),
        60 => (Some(br#"{"content_id":"no-text"}"#.to_vec()), "(no text)"),
        80 => (None, "(forgotten)"),
        90 => (
            Some(json!({ "content_id": key, "op": "delete" }).to_string().into_bytes()),
            "(deleted)",
        ),
        _ => {
            let text = TEXTS[pick(TEXTS.len(), 11)];
            let event = json!({
                "event_id": format!("e{number}"),
                "content_id": key,
                "community_id": COMMUNITIES[pick(COMMUNITIES.len(), 7)],
                "text": text,
            });
            (Some(event.to_string().into_bytes()), text)
        }
    };
    Sample { key, value, text }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn events_are_of_all_kinds_and_the_same_on_every_run() {
        let shown: std::collections::BTreeSet<&str> = (0..400).map(|number| sample(number).text).collect();
        assert_eq!(shown.len(), TEXTS.len() + 4);
        assert_eq!(sample(7).value, sample(7).value);
    }
}
