//! Which texts are nearly the same, without comparing all with all.
//!
//! Broder, "On the resemblance and containment of documents", 1997: texts as sets of 5-character
//! shingles, MinHash signatures, banded so that only likely pairs meet, each pair then judged by its
//! signatures. A signature does not give the text back, so a version can keep those of the rows that
//! it was trained on.

use std::collections::HashMap;

/// Hashes of a signature. The estimate of the resemblance has a standard error of about 0.05.
const HASHES: usize = 64;
/// Bands of four: a pair of resemblance 0.8 meets in at least one of 16 with probability 0.9998, one
/// of 0.3 with 0.12.
const BAND: usize = 4;
/// Characters of a shingle.
const SHINGLE: usize = 5;
/// From this estimated resemblance on two texts are near-duplicates.
pub const THRESHOLD: f64 = 0.7;

/// MinHash signature of a text.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Signature([u32; HASHES]);

impl Signature {
    /// Of the text's letters and digits, case folded, runs of anything else as one space.
    pub fn new(text: &str) -> Self {
        let folded = fold(text);
        let mut minima = [u32::MAX; HASHES];
        let mut shingle_of = |shingle: &[char]| {
            let base = shingle.iter().fold(0xcbf2_9ce4_8422_2325u64, |hash, &char| {
                (hash ^ u64::from(char as u32)).wrapping_mul(0x0100_0000_01b3)
            });
            for (index, minimum) in minima.iter_mut().enumerate() {
                *minimum = (*minimum).min((mix(base ^ mix(index as u64 + 1)) >> 32) as u32);
            }
        };
        if folded.len() < SHINGLE {
            shingle_of(&folded);
        } else {
            folded.windows(SHINGLE).for_each(shingle_of);
        }
        Self(minima)
    }

    /// Estimated Jaccard resemblance of the two texts' shingles, 0 to 1.
    pub fn resemblance(&self, other: &Self) -> f64 {
        let equal = self.0.iter().zip(&other.0).filter(|(a, b)| a == b).count();
        equal as f64 / HASHES as f64
    }

    /// The signature as numbers, to be stored.
    pub fn as_numbers(&self) -> &[u32] {
        &self.0
    }

    /// A stored signature, if it has the right length.
    pub fn from_numbers(numbers: &[u32]) -> Option<Self> {
        numbers.try_into().ok().map(Self)
    }
}

/// The folded text that signatures are made of: what counts as the same wording.
pub fn fold(text: &str) -> Vec<char> {
    let mut folded = Vec::with_capacity(text.len());
    for char in text.chars().flat_map(char::to_lowercase) {
        if char.is_alphanumeric() {
            folded.push(char);
        } else if folded.last().is_some_and(|&last| last != ' ') {
            folded.push(' ');
        }
    }
    if folded.last() == Some(&' ') {
        folded.pop();
    }
    folded
}

/// A finalising mix of 64 bits (Steele et al., SplitMix, 2014).
fn mix(mut x: u64) -> u64 {
    x = x.wrapping_add(0x9e37_79b9_7f4a_7c15);
    x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ (x >> 31)
}

/// Texts to be looked up by resemblance.
#[derive(Debug, Default)]
pub struct Index {
    signatures: Vec<Signature>,
    bands: HashMap<(usize, [u32; BAND]), Vec<u32>>,
}

impl Index {
    /// Adds a text's signature.
    pub fn insert(&mut self, signature: Signature) {
        let id = self.signatures.len() as u32;
        for (band, values) in signature.0.as_chunks::<BAND>().0.iter().enumerate() {
            self.bands.entry((band, *values)).or_default().push(id);
        }
        self.signatures.push(signature);
    }

    /// Whether a near-duplicate of this text is in the index.
    pub fn has_near(&self, signature: &Signature) -> bool {
        signature
            .0
            .as_chunks::<BAND>()
            .0
            .iter()
            .enumerate()
            .any(|(band, values)| {
                let candidates = self.bands.get(&(band, *values));
                let near = |&id: &u32| self.signatures[id as usize].resemblance(signature) >= THRESHOLD;
                candidates.is_some_and(|candidates| candidates.iter().any(near))
            })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LONG: &str = "the weather in the valley was fine today and we all went down to the river to swim";

    fn near(a: &str, b: &str) -> bool {
        let mut index = Index::default();
        index.insert(Signature::new("something else entirely, about trains and stations"));
        index.insert(Signature::new(a));
        index.has_near(&Signature::new(b))
    }

    #[test]
    fn small_changes_are_near_and_other_texts_are_not() {
        assert!(near(LONG, LONG));
        assert!(near(LONG, &LONG.to_uppercase()));
        assert!(near(LONG, &format!("{LONG}!!!")));
        assert!(near(LONG, &LONG.replace("fine", "nice")));
        assert!(!near(
            LONG,
            "the weather in the city was poor, so nobody left the house at all that day"
        ));
        assert!(near("ok", "OK!") && !near("ok", "no"));
        assert!(!near("", "ok") && near("", "!?"));
    }

    #[test]
    fn the_estimate_is_close_to_the_true_resemblance() {
        let words: Vec<String> = (0..400).map(|word| format!("w{}", mix(word) % 100_000)).collect();
        for shared in [0, 100, 200, 300, 400] {
            let (a, b) = (
                words[..400].join(" "),
                [&words[..shared], &vec!["x9z".to_owned(); 400 - shared]]
                    .concat()
                    .join(" "),
            );
            let set = |text: &str| {
                fold(text)
                    .windows(SHINGLE)
                    .map(<[char]>::to_vec)
                    .collect::<std::collections::HashSet<_>>()
            };
            let (sa, sb) = (set(&a), set(&b));
            let exact = sa.intersection(&sb).count() as f64 / sa.union(&sb).count() as f64;
            let estimate = Signature::new(&a).resemblance(&Signature::new(&b));
            assert!((estimate - exact).abs() < 0.2, "{shared}: {estimate}, exactly {exact}");
        }
    }

    #[test]
    fn a_stored_signature_is_the_same() {
        let signature = Signature::new(LONG);
        assert_eq!(Signature::from_numbers(signature.as_numbers()), Some(signature));
        assert_eq!(Signature::from_numbers(&[1, 2, 3]), None);
    }
}
