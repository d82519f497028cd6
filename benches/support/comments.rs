//! Made-up comments of realistic lengths.

use super::{Random, comment_lengths};

const WORDS: &str = "the a and of to in is it that was for on with as this but we you they so very really \
    garden beans tomato watering seeds Sunday morning rain compost bees flowers neighbour recipe kitchen bread \
    thanks lovely photo harvest basket summer spring weather window shelf wooden bench painted green, again. \
    always maybe tomorrow yesterday looking forward planted growing sweet sour ripe café jalapeño naïve I'd it's";

/// Returns so many different texts, made of harmless words.
pub fn texts(count: usize) -> Vec<String> {
    let words: Vec<&str> = WORDS.split_whitespace().collect();
    let mut random = Random::new(11);
    let text = |(number, tokens): (usize, usize)| {
        // Without its number, a short text would not be the only one of its kind.
        let mut text = format!("{number} ");
        while text.chars().count() < 4 * tokens {
            text.push_str(words[random.next() as usize % words.len()]);
            text.push(' ');
        }
        text.trim_end().to_owned()
    };
    let lengths = comment_lengths().into_iter().cycle();
    lengths.take(count).enumerate().map(text).collect()
}

/// Returns the key and the value of a comment's event.
pub fn event(id: usize, text: &str) -> (String, Vec<u8>) {
    let content_id = format!("comment-{id}");
    let value = serde_json::json!({
        "event_id": format!("event-{id}"),
        "content_id": content_id,
        "revision": 1,
        "op": "create",
        "community_id": format!("garden-{}", id % 20),
        "text": text,
    });
    (content_id, serde_json::to_vec(&value).unwrap())
}
