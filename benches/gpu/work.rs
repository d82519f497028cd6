//! Comments as random token ids with realistic lengths, and the number of FLOPs that scoring them needs.

use candle_core::Tensor;
use moderatord::model::forward::gemma::{Gemma, PackedRow, PrefixCache};
use moderatord::model::transfer::PendingLogits;

use crate::support::{Random, comment_lengths};

/// The number of tokens of the frame before a comment (`PREFIX`) and after it (`SUFFIX`).
pub const PREFIX: usize = 24;
pub const SUFFIX: usize = 8;
/// The ids of the labels. Any two ids would do.
pub const LABELS: [u32; 2] = [1001, 1002];

pub struct Work {
    pub prefix: PrefixCache,
    /// The rows of the unembedding that belong to the labels.
    labels: Tensor,
    /// The own tokens of each comment: its text and the end of the frame.
    pub comments: Vec<Vec<u32>>,
}

impl Work {
    pub fn new(gemma: &Gemma, count: usize) -> Self {
        let vocabulary = gemma.config().vocab_size as u64;
        let mut random = Random::new(7);
        let mut ids = |count: usize| -> Vec<u32> { (0..count).map(|_| (random.next() % vocabulary) as u32).collect() };
        let prefix = gemma.cache_prefix(&ids(PREFIX)).unwrap();
        let lengths = comment_lengths();
        let comments = lengths.iter().cycle().take(count).map(|&length| ids(length + SUFFIX));
        Self {
            prefix,
            labels: gemma.unembedding_rows(&LABELS).unwrap(),
            comments: comments.collect(),
        }
    }

    /// Splits the comments, in order, into micro-batches of at most `max_tokens` tokens.
    pub fn batches(&self, max_tokens: usize) -> Vec<&[Vec<u32>]> {
        let (mut batches, mut start, mut tokens) = (Vec::new(), 0, 0);
        for (end, comment) in self.comments.iter().enumerate() {
            if end > start && tokens + comment.len() > max_tokens {
                batches.push(&self.comments[start..end]);
                (start, tokens) = (end, 0);
            }
            tokens += comment.len();
        }
        batches.push(&self.comments[start..]);
        batches
    }

    /// Begins scoring comments without waiting for their logits, as the daemon does.
    pub fn begin<'a>(&self, gemma: &Gemma, comments: impl IntoIterator<Item = &'a [u32]>) -> PendingLogits {
        let row = |own| PackedRow { own, shared: PREFIX };
        let rows: Vec<PackedRow<'_>> = comments.into_iter().map(row).collect();
        gemma.begin(&rows, Some(&self.prefix), &self.labels).unwrap()
    }

    /// Scores comments and waits for their logits.
    pub fn score(&self, gemma: &Gemma, comments: &[Vec<u32>]) -> Vec<f32> {
        self.begin(gemma, comments.iter().map(Vec::as_slice)).wait().unwrap()
    }
}

/// Returns the FLOPs that scoring the comments needs. For a comment with t own tokens after a prefix of p tokens, it
/// counts 2t for each linear weight in all layers but the last, 2t for each weight of K and V in the last layer, 2 for
/// each weight of Q, O and MLP in the last layer, and 4 for each element of the attended pairs of the heads. Nothing
/// else is counted.
pub fn useful_flops(gemma: &Gemma, comments: &[Vec<u32>]) -> f64 {
    let config = gemma.config();
    let layers = config.num_layers() as f64;
    let queries = (config.num_attention_heads * config.head_dim) as f64;
    let keys = (config.num_key_value_heads * config.head_dim) as f64;
    let (hidden, inner) = (config.hidden_size as f64, config.intermediate_size as f64);
    let keys_values = 2.0 * hidden * keys;
    let rest = 2.0 * hidden * queries + 3.0 * hidden * inner;
    let mut total = 0.0;
    for comment in comments {
        let (t, p) = (comment.len() as f64, PREFIX as f64);
        let pairs = t * p + t * (t + 1.0) / 2.0;
        total += 2.0 * t * (layers - 1.0) * (keys_values + rest) + 2.0 * t * keys_values + 2.0 * rest;
        total += 4.0 * queries * (pairs * (layers - 1.0) + (p + t));
    }
    total
}
