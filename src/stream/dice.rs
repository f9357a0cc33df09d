//! Random numbers of tests.

/// Knuth's MMIX generator: small, seeded, the same everywhere.
pub struct Dice(pub u64);

impl Dice {
    pub fn roll(&mut self, bound: u64) -> u64 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) % bound
    }

    pub fn chance(&mut self, percent: u64) -> bool {
        self.roll(100) < percent
    }
}

/// What formats and languages stumble over.
const NASTY: [&[u8]; 24] = [
    b"\"",
    b"\\",
    b"\\u",
    b"\\ud800",
    b"{",
    b"}",
    b"[",
    b"]",
    b",",
    b":",
    b"'",
    b"--",
    b"/*",
    b"$$",
    b"${",
    b"(",
    b")",
    b";",
    b"-1e999",
    b"18446744073709551616",
    b"null",
    b"\xff",
    b"\0",
    "\u{1F600}\u{301}".as_bytes(),
];

impl Dice {
    /// A damaged copy: bits flipped, pieces cut out, doubled, swapped or put in.
    pub fn mutate(&mut self, bytes: &[u8]) -> Vec<u8> {
        let mut out = bytes.to_vec();
        for _ in 0..=self.roll(4) {
            let at = self.roll(out.len() as u64 + 1) as usize;
            let end = (at + self.roll(24) as usize).min(out.len());
            match self.roll(6) {
                0 if at < out.len() => out[at] ^= 1 << self.roll(8),
                1 => drop(out.drain(at..end)),
                2 => {
                    let piece = out[at..end].to_vec();
                    let to = self.roll(out.len() as u64 + 1) as usize;
                    out.splice(to..to, piece);
                }
                3 => out.truncate(at),
                4 => {
                    let junk: Vec<u8> = (0..self.roll(9)).map(|_| self.roll(256) as u8).collect();
                    out.splice(at..end, junk);
                }
                _ => drop(out.splice(at..at, NASTY[self.roll(NASTY.len() as u64) as usize].iter().copied())),
            }
        }
        out
    }
}
