//! Generated feedback that follows a rule simple enough to be trained on a few dozen rows.

const WORDS: [&str; 48] = [
    "garden", "river", "house", "train", "captain", "soup", "street", "bread", "window", "friend", "morning",
    "evening", "letter", "music", "bridge", "market", "apple", "tea", "coffee", "table", "chair", "forest", "mountain",
    "lake", "boat", "ship", "island", "summer", "winter", "autumn", "spring", "flower", "tree", "grass", "stone",
    "road", "path", "village", "city", "tower", "castle", "school", "teacher", "student", "book", "page", "pen",
    "paper",
];

/// Returns the key and the event with the given number. Even numbers give texts about rain, which are labelled hateful.
pub fn label(number: u64) -> (String, String) {
    let mut state = number.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut draw = |below: usize| {
        // A linear congruential generator with the constants of Knuth's MMIX.
        state = state
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        usize::try_from(state >> 33).unwrap() % below
    };
    let mut words: Vec<&str> = (0..6 + draw(6)).map(|_| WORDS[draw(WORDS.len())]).collect();
    let is_rain = number.is_multiple_of(2);
    words.insert(draw(words.len()), if is_rain { "rain rain rain" } else { "sunny" });
    let key = format!("f{number}");
    let event = serde_json::json!({
        "content_id": key,
        "text": words.join(" "),
        "label": if is_rain { "hateful" } else { "ok" },
        "source": "moderator",
    });
    (key, event.to_string())
}
