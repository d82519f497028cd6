//! The order in which the GPU's kernels read the matrix B of a delta.
//!
//! A warp multiplies 16 outputs by 8 tokens and 16 ranks at a time (`mma.m16n8k16` of the PTX manual). Each of its 32
//! lanes holds four registers of B: for lane `4 g + t`, two outputs at the ranks `2 t`, `2 t + 1` and `2 t + 8`,
//! `2 t + 9`. Two such products cover a chunk of 32 outputs. Which outputs they stand for is chosen so that neighbouring lanes can exchange halves and then hold consecutive
//! outputs, which they read and write at once (delta.cuh).

use half::bf16;
use rayon::prelude::*;

/// The number of ranks of one product. Ranks are padded with zeros to a multiple of this.
pub(in crate::model) const RANKS: usize = 16;
/// The number of outputs of a chunk.
const CHUNK: usize = 32;
/// The number of lanes of a warp.
const LANES: usize = 32;
/// The number of words that a warp reads for a chunk and 16 ranks.
const STEP_WORDS: usize = 2 * LANES * 4;

/// The outputs that a chunk's products stand for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in crate::model) enum Columns {
    /// 32 consecutive outputs, of which a lane gets 8.
    Plain,
    /// 16 outputs of the first half of a head and the 16 that they are rotated with, of which a lane gets 4 each.
    RotatedHeads {
        /// The number of outputs of a head.
        head_dim: usize,
    },
}

impl Columns {
    /// Returns the output of a chunk that lanes with `g` = `group` hold in a half of a product, of which a chunk has four.
    fn output(self, chunk: usize, half_product: usize, group: usize) -> usize {
        let (lane, second) = (group / 2, group % 2);
        match self {
            Self::Plain => chunk * CHUNK + 8 * lane + 2 * half_product + second,
            Self::RotatedHeads { head_dim } => {
                let chunks = head_dim / CHUNK;
                let (head, chunk) = (chunk / chunks, chunk % chunks);
                let half = half_product / 2 * (head_dim / 2);
                head * head_dim + half + 16 * chunk + 4 * lane + 2 * (half_product % 2) + second
            }
        }
    }
}

/// Rounds a matrix (outputs, rank), given row by row, to bf16 and returns it in the order of fragments: by chunk of 32
/// outputs, by 16 ranks, by product, by lane, 4 words of two numbers each. Missing outputs and ranks are zeros.
pub(in crate::model) fn in_fragments(b: &[f32], outputs: usize, rank: usize, columns: Columns) -> Vec<u32> {
    let steps = rank.div_ceil(RANKS);
    let value = |output: usize, at: usize| {
        if output < outputs && at < rank {
            u32::from(bf16::from_f32(b[output * rank + at]).to_bits())
        } else {
            0
        }
    };
    let mut words = vec![0u32; outputs.div_ceil(CHUNK) * steps * STEP_WORDS];
    words
        .par_chunks_mut(steps * STEP_WORDS)
        .enumerate()
        .for_each(|(chunk, words)| {
            for (index, word) in words.iter_mut().enumerate() {
                let (step, product, lane, register) = (
                    index / STEP_WORDS,
                    index / (4 * LANES) % 2,
                    index / 4 % LANES,
                    index % 4,
                );
                let output = columns.output(chunk, 2 * product + register % 2, lane / 4);
                let first = step * RANKS + 2 * (lane % 4) + 8 * (register / 2);
                *word = value(output, first) | value(output, first + 1) << 16;
            }
        });
    words
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Multiplies as the GPU does: the lanes hold a chunk's fragments, and the result belongs to the output that their
    /// group and half product stand for.
    fn multiplied(words: &[u32], low: &[f32], steps: usize, columns: Columns, chunks: usize) -> Vec<(usize, f32)> {
        let mut found = Vec::new();
        for (chunk, half_product, group) in
            (0..chunks).flat_map(|chunk| (0..4).flat_map(move |half| (0..8).map(move |group| (chunk, half, group))))
        {
            let mut sum = 0.0;
            for rank in 0..steps * RANKS {
                let (step, within) = (rank / RANKS, rank % RANKS);
                let (lane, register) = (4 * group + within % 8 / 2, half_product % 2 + 2 * (within / 8));
                let at = (((chunk * steps + step) * 2 + half_product / 2) * LANES + lane) * 4 + register;
                let bits = if within % 2 == 0 { words[at] } else { words[at] >> 16 } as u16;
                sum += low.get(rank).copied().unwrap_or(0.0) * bf16::from_bits(bits).to_f32();
            }
            found.push((columns.output(chunk, half_product, group), sum));
        }
        found
    }

    #[test]
    fn fragments_multiply_to_the_product() {
        for (outputs, rank, columns) in [
            (64usize, 16usize, Columns::Plain),
            (72, 3, Columns::Plain),
            (64, 40, Columns::RotatedHeads { head_dim: 32 }),
            (512, 8, Columns::RotatedHeads { head_dim: 256 }),
        ] {
            let b: Vec<f32> = (0..outputs * rank)
                .map(|index| (index * 7 % 31) as f32 - 15.0)
                .collect();
            let low: Vec<f32> = (0..rank).map(|index| index as f32 - 2.0).collect();
            let steps = rank.div_ceil(RANKS);
            let words = in_fragments(&b, outputs, rank, columns);
            let mut found = multiplied(&words, &low, steps, columns, outputs.div_ceil(CHUNK));
            found.sort_by_key(|(output, _)| *output);
            let expected = |output: usize| -> f32 {
                let row = b.get(output * rank..(output + 1) * rank).unwrap_or_default();
                row.iter().zip(&low).map(|(b, low)| b * low).sum()
            };
            for (index, (output, sum)) in found.into_iter().enumerate() {
                assert_eq!((output, sum), (index, expected(index)), "{columns:?}");
            }
        }
    }

    /// Two neighbouring groups hold consecutive outputs.
    #[test]
    fn neighbours_hold_consecutive_outputs() {
        let of_lane = |columns: Columns, lane: usize| -> Vec<usize> {
            (0..4)
                .flat_map(|half| [0, 1].map(|second| columns.output(1, half, 2 * lane + second)))
                .collect()
        };
        assert_eq!(of_lane(Columns::Plain, 2), (48..56).collect::<Vec<_>>());
        let heads = Columns::RotatedHeads { head_dim: 128 };
        assert_eq!(of_lane(heads, 3), [28, 29, 30, 31, 92, 93, 94, 95]);
    }
}
