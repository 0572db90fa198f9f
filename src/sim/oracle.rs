//! What every sector of a volume may contain.
//!
//! Each write stamps its sectors with its number; zeroes are number 0. The oracle keeps, for each
//! sector, the writes that a read may return: the last acknowledged ones and those in doubt. It
//! judges reads by when they began, so it holds for concurrent clients: a write is out once a
//! later one was acknowledged, or was read, before the read began. What was in doubt and was read
//! once never flips back.

use std::collections::BTreeMap;

use crate::id::BLOCK_SIZE;

/// Bytes of the unit the oracle judges.
pub const SECTOR: usize = 512;
/// Sectors of a block.
pub const SECTORS_PER_BLOCK: usize = BLOCK_SIZE / SECTOR;

#[derive(Debug, Clone, Copy)]
struct Candidate {
    /// Number of the write.
    id: u64,
    /// When it ended (acknowledged, or given up and settled by a recovery); none while in flight
    /// or in doubt.
    ended: Option<u64>,
    /// Reads that begin later may not return it.
    dead: Option<u64>,
}

/// What a finished write means for the oracle.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outcome {
    /// The client was told that it is durable.
    Acknowledged,
    /// The client got an error or no answer: it may be there or not, or come with the next
    /// recovery.
    InDoubt,
    /// As in doubt, but whatever became of it has become of it by now.
    Settled,
}

/// A write under way.
#[derive(Debug, Clone)]
pub struct Write {
    id: u64,
    start: u64,
    first: u64,
    count: u64,
    zero: bool,
}

impl Write {
    /// The number that the sectors are stamped with; 0 for zeroes.
    pub fn stamp(&self) -> u64 {
        if self.zero { 0 } else { self.id }
    }

    /// The bytes to write.
    pub fn content(&self) -> Vec<u8> {
        (self.first..self.first + self.count).flat_map(|s| sector(self.stamp(), s)).collect()
    }
}

/// The oracle of one volume.
#[derive(Debug, Default)]
pub struct Oracle {
    now: u64,
    next: u64,
    sectors: BTreeMap<u64, Vec<(Candidate, u64)>>,
    doubtful: Vec<Write>,
}

/// The content of a sector stamped by write `id`.
fn sector(id: u64, number: u64) -> [u8; SECTOR] {
    let mut out = [0; SECTOR];
    if id == 0 {
        return out;
    }
    let mut x = id.wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ number;
    out[..8].copy_from_slice(&id.to_le_bytes());
    out[8..16].copy_from_slice(&number.to_le_bytes());
    for chunk in out[16..].chunks_exact_mut(8) {
        x ^= x << 13;
        x ^= x >> 7;
        x ^= x << 17;
        chunk.copy_from_slice(&x.to_le_bytes());
    }
    out
}

impl Oracle {
    fn tick(&mut self) -> u64 {
        self.now += 1;
        self.now
    }

    /// Begins a write of `count` sectors at `first`.
    pub fn begin(&mut self, first: u64, count: u64, zero: bool) -> Write {
        let start = self.tick();
        self.next += 1;
        let write = Write { id: self.next, start, first, count, zero };
        for number in first..first + count {
            let candidates = self.sectors.entry(number).or_insert_with(initial);
            let candidate = Candidate { id: write.id, ended: None, dead: None };
            candidates.push((candidate, write.stamp()));
        }
        write
    }

    /// Ends a write.
    pub fn end(&mut self, write: Write, outcome: Outcome) {
        let now = self.tick();
        if outcome == Outcome::InDoubt {
            self.doubtful.push(write);
            return;
        }
        for number in write.first..write.first + write.count {
            let Some(candidates) = self.sectors.get_mut(&number) else { continue };
            for (candidate, _) in candidates.iter_mut() {
                if candidate.id == write.id {
                    candidate.ended = Some(now);
                } else if outcome == Outcome::Acknowledged
                    && candidate.ended.is_some_and(|ended| ended < write.start)
                {
                    candidate.dead.get_or_insert(now);
                }
            }
            self.forget(number);
        }
    }

    /// A take-over was completed: what was in doubt before is settled, one way or the other.
    pub fn recovered(&mut self) {
        let now = self.tick();
        for write in std::mem::take(&mut self.doubtful) {
            for number in write.first..write.first + write.count {
                let Some(candidates) = self.sectors.get_mut(&number) else { continue };
                for (candidate, _) in candidates.iter_mut().filter(|(c, _)| c.id == write.id) {
                    candidate.ended.get_or_insert(now);
                }
            }
        }
    }

    /// Drops candidates that no read under way can return any more. Reads are short: what is dead
    /// for a thousand events is forgotten.
    fn forget(&mut self, number: u64) {
        let now = self.now;
        if let Some(candidates) = self.sectors.get_mut(&number) {
            candidates.retain(|(c, _)| c.dead.is_none_or(|dead| dead + 100_000 > now));
        }
    }

    /// The time at which a read begins.
    pub fn begin_read(&mut self) -> u64 {
        self.tick()
    }

    /// Judges what a read that began at `start` returned for the sectors from `first` on.
    ///
    /// # Errors
    /// The first sector that holds what it may not, in words.
    pub fn end_read(&mut self, start: u64, first: u64, data: &[u8]) -> Result<(), String> {
        let now = self.tick();
        for (number, content) in (first..).zip(data.chunks_exact(SECTOR)) {
            let stamp = u64::from_le_bytes(content[..8].try_into().expect("eight bytes"));
            if content != sector(stamp, number) {
                return Err(format!(
                    "sector {number} holds what was never written there: {:02x?}…",
                    &content[..24]
                ));
            }
            let candidates = self.sectors.entry(number).or_insert_with(initial);
            let allowed = |c: &Candidate| c.dead.is_none_or(|dead| dead > start);
            if !candidates.iter().any(|(c, s)| *s == stamp && allowed(c)) {
                return Err(format!(
                    "sector {number} holds write {stamp}, a read begun at {start} may see {candidates:?}"
                ));
            }
            // What ended before this read began and is not what it saw was overwritten by it,
            // unless the same stamp (zeroes) was written more than once.
            let same = candidates.iter().filter(|(c, s)| *s == stamp && allowed(c)).count();
            if same == 1 {
                for (candidate, s) in candidates.iter_mut() {
                    if *s != stamp && candidate.ended.is_some_and(|ended| ended < start) {
                        candidate.dead.get_or_insert(now);
                    }
                }
            }
        }
        Ok(())
    }
}

fn initial() -> Vec<(Candidate, u64)> {
    vec![(Candidate { id: 0, ended: Some(0), dead: None }, 0)]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lost_and_stale_are_told() {
        let mut oracle = Oracle::default();
        let a = oracle.begin(0, 1, false);
        let content_a = a.content();
        oracle.end(a, Outcome::Acknowledged);
        let t = oracle.begin_read();
        assert!(oracle.end_read(t, 0, &[0; SECTOR]).is_err(), "the acknowledged write is lost");
        let b = oracle.begin(0, 1, false);
        let content_b = b.content();
        let t = oracle.begin_read();
        oracle.end_read(t, 0, &content_a).unwrap();
        let t = oracle.begin_read();
        oracle.end_read(t, 0, &content_b).unwrap();
        let t = oracle.begin_read();
        assert!(oracle.end_read(t, 0, &content_a).is_err(), "it flips back");
        oracle.end(b, Outcome::InDoubt);
        oracle.recovered();
        let t = oracle.begin_read();
        oracle.end_read(t, 0, &content_b).unwrap();
        let mut torn = content_b.clone();
        torn[300] ^= 1;
        assert!(oracle.end_read(t, 0, &torn).is_err());
    }

    #[test]
    fn a_write_in_doubt_may_be_there_or_not_but_not_both() {
        for seen in [true, false] {
            let mut oracle = Oracle::default();
            let a = oracle.begin(5, 1, false);
            let content = [vec![0; SECTOR], a.content()];
            oracle.end(a, Outcome::InDoubt);
            oracle.recovered();
            let t = oracle.begin_read();
            oracle.end_read(t, 5, &content[usize::from(seen)]).unwrap();
            let t = oracle.begin_read();
            assert!(oracle.end_read(t, 5, &content[usize::from(!seen)]).is_err());
        }
    }
}
