//! The merges of byte-pair encoding.
//!
//! A text begins as one symbol for each character, or for each byte of a character that has no token. Of all neighbours
//! that merge, the pair with the lowest rank merges first, and of several with this rank, the leftmost. A symbol is
//! spelled as what it was merged from. Two neighbours therefore never become part of the same token if no two tokens
//! merge of which one ends with the last character of the left neighbour, and the other begins with the first
//! character of the right one. A text is divided at such places, most of which are between words, because few merges are
//! fast.

use std::cmp::Reverse;
use std::collections::{BinaryHeap, HashMap, HashSet};
use std::hash::{BuildHasherDefault, Hasher};

use serde_json::Value;

/// Stands for the absence of a symbol, an id or a rank.
const NONE: u32 = u32::MAX;

/// The most symbols among which it is faster to look for the lowest rank than to keep a queue.
const MAX_SCANNED: usize = 24;

/// The tokens of single characters and bytes, and the pairs that merge.
pub(super) struct Merges {
    ascii: [u32; 128],
    other: HashMap<char, u32, BuildHasherDefault<KeyHasher>>,
    bytes: [u32; 256],
    /// The rank of each pair.
    ranks: HashMap<u64, u32, BuildHasherDefault<KeyHasher>>,
    /// The token that the pair of each rank becomes.
    merged: Vec<u32>,
    /// For each ASCII character, one bit for each ASCII character that it [joins](Merges::joins).
    ascii_joins: [u128; 128],
    /// All pairs of characters that join.
    joins: HashSet<u64, BuildHasherDefault<KeyHasher>>,
}

/// A token in a text that is being merged, with the rank at which it merges with the next one.
struct Pair {
    left: u32,
    rank: u32,
}

/// A token in a text that is being merged, linked with its neighbours.
struct Symbol {
    /// `NONE` if it has been merged into the one before it.
    id: u32,
    previous: u32,
    next: u32,
}

impl Merges {
    /// Reads the merges of a `tokenizer.json` with this vocabulary.
    ///
    /// Returns `None` if they are malformed, if two tokens have the same id, or if some text would have characters
    /// without tokens.
    pub(super) fn read(merges: &Value, vocabulary: &HashMap<String, u32>) -> Option<Self> {
        let ids: HashSet<u32> = vocabulary.values().copied().collect();
        if ids.len() != vocabulary.len() || ids.contains(&NONE) {
            return None;
        }
        let mut read = Self {
            ascii: [NONE; 128],
            other: HashMap::default(),
            bytes: [NONE; 256],
            ranks: HashMap::default(),
            merged: Vec::new(),
            ascii_joins: [0; 128],
            joins: HashSet::default(),
        };
        for (token, &id) in vocabulary {
            let mut chars = token.chars();
            if let (Some(char), None) = (chars.next(), chars.next()) {
                match read.ascii.get_mut(char as usize) {
                    Some(of_char) => *of_char = id,
                    None => {
                        read.other.insert(char, id);
                    }
                }
            }
        }
        for byte in 0..=u8::MAX {
            let id = vocabulary.get(&format!("<0x{byte:02X}>")).copied();
            // UTF-8 does not contain the other bytes, or they are characters with tokens.
            let is_needed = match byte {
                0..=0x7f => read.ascii[usize::from(byte)] == NONE,
                0x80..=0xbf | 0xc2..=0xf4 => true,
                0xc0 | 0xc1 | 0xf5..=0xff => false,
            };
            if is_needed && id.is_none() {
                return None;
            }
            read.bytes[usize::from(byte)] = id.unwrap_or(NONE);
        }
        for merge in merges.as_array()? {
            let (left, right) = match merge {
                Value::Array(pair) => match pair.as_slice() {
                    [Value::String(left), Value::String(right)] => (left.as_str(), right.as_str()),
                    _ => return None,
                },
                // The older form, in which the first line can be the version.
                Value::String(line) if line.starts_with("#version") => continue,
                Value::String(line) => line.split_once(' ')?,
                _ => return None,
            };
            let rank = u32::try_from(read.merged.len()).ok()?;
            let pair = key(*vocabulary.get(left)?, *vocabulary.get(right)?);
            read.ranks.insert(pair, rank);
            read.merged.push(*vocabulary.get(&format!("{left}{right}"))?);
            if let (Some(last), Some(first)) = (left.chars().next_back(), right.chars().next()) {
                read.joins.insert(key(last.into(), first.into()));
                match read.ascii_joins.get_mut(last as usize) {
                    Some(joins) if first.is_ascii() => *joins |= 1 << (first as u32),
                    _ => {}
                }
            }
        }
        Some(read)
    }

    /// Adds the ids of a normalised text.
    pub(super) fn encode(&self, text: &str, ids: &mut Vec<u32>) {
        let mut symbols: Vec<u32> = Vec::with_capacity(64);
        let mut buffer = Vec::with_capacity(64);
        let mut last = None;
        for char in text.chars() {
            let id = self.token(char);
            // The symbol of a byte is spelled `<0x41>`.
            let (first, end) = if id == NONE { ('<', '>') } else { (char, char) };
            if last.is_some_and(|last| !self.joins(last, first)) {
                self.merge(&symbols, &mut buffer, ids);
                symbols.clear();
            }
            if id == NONE {
                let mut utf8 = [0; 4];
                let bytes = char.encode_utf8(&mut utf8).bytes();
                symbols.extend(bytes.map(|byte| self.bytes[usize::from(byte)]));
            } else {
                symbols.push(id);
            }
            last = Some(end);
        }
        self.merge(&symbols, &mut buffer, ids);
    }

    /// Merges the symbols of a part of a text, and adds the ids of the result.
    fn merge(&self, symbols: &[u32], buffer: &mut Vec<Pair>, ids: &mut Vec<u32>) {
        match symbols {
            [] => {}
            [id] => ids.push(*id),
            [..] if symbols.len() <= MAX_SCANNED => self.merge_by_scanning(symbols, buffer, ids),
            [..] => self.merge_by_queue(symbols, ids),
        }
    }

    /// Looks for the lowest rank before each merge, which is fastest for few symbols.
    fn merge_by_scanning(&self, symbols: &[u32], pairs: &mut Vec<Pair>, ids: &mut Vec<u32>) {
        let rank = |left: u32, right: Option<&Pair>| right.map_or(NONE, |right| self.rank(left, right.left));
        pairs.clear();
        pairs.extend(symbols.iter().map(|&left| Pair { left, rank: NONE }));
        for at in 0..pairs.len() {
            pairs[at].rank = rank(pairs[at].left, pairs.get(at + 1));
        }
        // Of several with the lowest rank, this is the leftmost.
        while let Some((at, lowest)) = pairs.iter().enumerate().min_by_key(|(_, pair)| pair.rank)
            && lowest.rank != NONE
        {
            pairs[at].left = self.merged[lowest.rank as usize];
            pairs.remove(at + 1);
            pairs[at].rank = rank(pairs[at].left, pairs.get(at + 1));
            if let Some(before) = at.checked_sub(1) {
                pairs[before].rank = rank(pairs[before].left, pairs.get(at));
            }
        }
        ids.extend(pairs.iter().map(|pair| pair.left));
    }

    /// Keeps the pairs in a queue, so that the time grows little faster than the number of symbols.
    fn merge_by_queue(&self, symbols: &[u32], ids: &mut Vec<u32>) {
        let link = |(&id, at): (&u32, u32)| Symbol {
            id,
            previous: at.wrapping_sub(1),
            next: if at as usize + 1 < symbols.len() { at + 1 } else { NONE },
        };
        let mut symbols: Vec<Symbol> = symbols.iter().zip(0..).map(link).collect();
        // A rank in the upper half and a position in the lower one: the lowest entry is merged first.
        let entry = |at: u32, left: u32, right: u32| {
            let rank = self.rank(left, right);
            (rank != NONE).then(|| Reverse(u64::from(rank) << 32 | u64::from(at)))
        };
        let pairs = symbols.windows(2).zip(0..);
        let pairs = pairs.filter_map(|(pair, at)| entry(at, pair[0].id, pair[1].id));
        let mut queue: BinaryHeap<Reverse<u64>> = pairs.collect::<Vec<_>>().into();
        while let Some(Reverse(lowest)) = queue.pop() {
            let (rank, at) = ((lowest >> 32) as u32, lowest as u32);
            let Symbol { id, previous, next } = symbols[at as usize];
            // The entry is out of date if one of its symbols has merged since.
            if id == NONE || next == NONE || self.rank(id, symbols[next as usize].id) != rank {
                continue;
            }
            let (merged, after) = (self.merged[rank as usize], symbols[next as usize].next);
            symbols[next as usize].id = NONE;
            (symbols[at as usize].id, symbols[at as usize].next) = (merged, after);
            if previous != NONE {
                queue.extend(entry(previous, symbols[previous as usize].id, merged));
            }
            if after != NONE {
                symbols[after as usize].previous = at;
                queue.extend(entry(at, merged, symbols[after as usize].id));
            }
        }
        ids.extend(symbols.iter().map(|symbol| symbol.id).filter(|&id| id != NONE));
    }

    /// Returns whether any two tokens merge of which the left one ends with one character and the right one begins with
    /// the other.
    fn joins(&self, last: char, first: char) -> bool {
        match self.ascii_joins.get(last as usize) {
            Some(joins) if first.is_ascii() => joins >> (first as u32) & 1 == 1,
            _ => self.joins.contains(&key(last.into(), first.into())),
        }
    }

    /// Returns whether a character has a token of its own.
    pub(super) fn has_token(&self, char: char) -> bool {
        self.token(char) != NONE
    }

    /// Returns the ids of every two tokens that merge.
    pub(super) fn pairs(&self) -> impl Iterator<Item = (u32, u32)> {
        self.ranks.keys().map(|&key| ((key >> 32) as u32, key as u32))
    }

    fn rank(&self, left: u32, right: u32) -> u32 {
        self.ranks.get(&key(left, right)).copied().unwrap_or(NONE)
    }

    fn token(&self, char: char) -> u32 {
        let of_ascii = self.ascii.get(char as usize).copied();
        of_ascii.unwrap_or_else(|| self.other.get(&char).copied().unwrap_or(NONE))
    }
}

fn key(left: u32, right: u32) -> u64 {
    u64::from(left) << 32 | u64::from(right)
}

/// A fast hash of one number. The tables are filled from the checkpoint and only looked up for texts, so texts cannot
/// cause collisions.
#[derive(Default)]
struct KeyHasher(u64);

impl Hasher for KeyHasher {
    fn write(&mut self, bytes: &[u8]) {
        bytes
            .iter()
            .for_each(|&byte| self.write_u64(self.0 << 8 | u64::from(byte)));
    }

    fn write_u32(&mut self, number: u32) {
        self.write_u64(number.into());
    }

    fn write_u64(&mut self, number: u64) {
        // The golden ratio, as in Fibonacci hashing; the table uses the lowest bits too.
        let product = number.wrapping_mul(0x9e37_79b9_7f4a_7c15);
        self.0 = product ^ product >> 32;
    }

    fn finish(&self) -> u64 {
        self.0
    }
}
