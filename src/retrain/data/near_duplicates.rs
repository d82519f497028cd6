//! Finds texts that are nearly the same, without comparing every pair of texts.
//!
//! The method is MinHash (Broder, "On the resemblance and containment of documents", 1997). A text is a set of
//! 5-character shingles, and two signatures estimate how many of their shingles two texts share. Signatures are
//! divided into bands, and only texts with an equal band are compared. A text cannot be recovered from its signature,
//! so a version can store the signatures of the rows that it was trained on.

use std::collections::HashMap;

/// Number of hashes in a signature. They estimate the resemblance with a standard error of at most
/// `0.5 / sqrt(HASHES)`, which is 0.0625.
const HASHES: usize = 64;
/// Number of hashes in a band. With 16 bands of four hashes, two texts of resemblance 0.8 have an equal band with
/// probability 0.9998, and two texts of resemblance 0.3 with probability 0.12.
const BAND: usize = 4;
/// Number of characters in a shingle.
const SHINGLE: usize = 5;
/// Two texts are near-duplicates if their estimated resemblance is at least this.
const THRESHOLD: f64 = 0.7;

/// The MinHash signature of a text.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Signature([u32; HASHES]);

impl Signature {
    /// Computes the signature of a text after [`fold`]ing it.
    pub fn new(text: &str) -> Self {
        let folded = fold(text);
        let mut minima = [u32::MAX; HASHES];
        let mut add_shingle = |shingle: &[char]| {
            let base = shingle.iter().fold(0xcbf2_9ce4_8422_2325u64, |hash, &char| {
                (hash ^ u64::from(char as u32)).wrapping_mul(0x0100_0000_01b3)
            });
            for (index, minimum) in minima.iter_mut().enumerate() {
                *minimum = (*minimum).min((mix(base ^ mix(index as u64 + 1)) >> 32) as u32);
            }
        };
        if folded.len() < SHINGLE {
            add_shingle(&folded);
        } else {
            folded.windows(SHINGLE).for_each(add_shingle);
        }
        Self(minima)
    }

    /// Estimates the Jaccard similarity of the shingles of the two texts, from 0 to 1.
    pub fn resemblance(&self, other: &Self) -> f64 {
        let equal = self.0.iter().zip(&other.0).filter(|(a, b)| a == b).count();
        equal as f64 / HASHES as f64
    }

    /// Returns the signature as numbers, for storage.
    pub fn as_numbers(&self) -> &[u32] {
        &self.0
    }

    /// Restores a stored signature. Returns `None` if its length is wrong.
    pub fn from_numbers(numbers: &[u32]) -> Option<Self> {
        numbers.try_into().ok().map(Self)
    }
}

/// Returns the letters and digits of a text in lower case. Each run of other characters becomes one space, or nothing
/// at the start and the end.
///
/// Texts that are equal after folding count as the same wording.
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

/// Mixes the bits of a number with the finaliser of SplitMix64 (Steele et al., 2014).
fn mix(mut x: u64) -> u64 {
    x = x.wrapping_add(0x9e37_79b9_7f4a_7c15);
    x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ (x >> 31)
}

/// An index that finds near-duplicates of a text by their signatures.
#[derive(Debug, Default)]
pub struct NearDuplicateIndex {
    signatures: Vec<Signature>,
    bands: HashMap<(usize, [u32; BAND]), Vec<u32>>,
}

impl NearDuplicateIndex {
    /// Adds the signature of a text.
    pub fn insert(&mut self, signature: Signature) {
        let id = self.signatures.len() as u32;
        for (band, values) in signature.0.as_chunks::<BAND>().0.iter().enumerate() {
            self.bands.entry((band, *values)).or_default().push(id);
        }
        self.signatures.push(signature);
    }

    /// Returns whether the index contains a near-duplicate of the text with this signature.
    pub fn contains_near_duplicate(&self, signature: &Signature) -> bool {
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

    fn are_near_duplicates(a: &str, b: &str) -> bool {
        let mut index = NearDuplicateIndex::default();
        index.insert(Signature::new("something else entirely, about trains and stations"));
        index.insert(Signature::new(a));
        index.contains_near_duplicate(&Signature::new(b))
    }

    #[test]
    fn texts_with_small_changes_are_near_duplicates_and_different_texts_are_not() {
        assert!(are_near_duplicates(LONG, LONG));
        assert!(are_near_duplicates(LONG, &LONG.to_uppercase()));
        assert!(are_near_duplicates(LONG, &format!("{LONG}!!!")));
        assert!(are_near_duplicates(LONG, &LONG.replace("fine", "nice")));
        assert!(!are_near_duplicates(
            LONG,
            "the weather in the city was poor, so nobody left the house at all that day"
        ));
        assert!(are_near_duplicates("ok", "OK!") && !are_near_duplicates("ok", "no"));
        assert!(!are_near_duplicates("", "ok") && are_near_duplicates("", "!?"));
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
            assert!(
                (estimate - exact).abs() < 0.2,
                "{shared}: {estimate}, expected about {exact}"
            );
        }
    }

    #[test]
    fn a_signature_survives_storage() {
        let signature = Signature::new(LONG);
        assert_eq!(Signature::from_numbers(signature.as_numbers()), Some(signature));
        assert_eq!(Signature::from_numbers(&[1, 2, 3]), None);
    }
}
