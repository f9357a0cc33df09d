//! Which offsets a table has, one bit each: duplicates and holes are counted exactly, whatever the order of the rows.

use std::collections::BTreeMap;

/// Offsets per chunk, 8 KiB of bits.
const CHUNK: i64 = 65_536;

/// The offsets of one partition.
#[derive(Debug, Default)]
pub struct Origins {
    chunks: BTreeMap<i64, Vec<u64>>,
    pub rows: u64,
    /// Rows whose offset another row has, and the least of these offsets.
    pub duplicates: u64,
    pub twice: Option<i64>,
    least: Option<i64>,
    greatest: Option<i64>,
}

impl Origins {
    pub fn add(&mut self, offset: i64) {
        let bits =
            self.chunks.entry(offset.div_euclid(CHUNK)).or_insert_with(|| vec![0; CHUNK as usize / 64]);
        let at = offset.rem_euclid(CHUNK) as usize;
        let (word, bit) = (&mut bits[at / 64], 1_u64 << (at % 64));
        if *word & bit != 0 {
            self.duplicates += 1;
            self.twice = Some(self.twice.map_or(offset, |known| known.min(offset)));
        }
        *word |= bit;
        self.rows += 1;
        self.least = Some(self.least.map_or(offset, |known| known.min(offset)));
        self.greatest = Some(self.greatest.map_or(offset, |known| known.max(offset)));
    }

    pub fn first(&self) -> i64 {
        self.least.unwrap_or(0)
    }

    /// Behind the last one.
    pub fn end(&self) -> i64 {
        self.greatest.map_or(0, |greatest| greatest + 1)
    }

    /// Offsets without a row between the first and the last: how many, and the least of them.
    pub fn holes(&self) -> Option<(u64, i64)> {
        let distinct = self.rows - self.duplicates;
        let holes = (self.end() - self.first()).unsigned_abs() - distinct;
        (holes > 0).then(|| (holes, self.first_hole()))
    }

    fn first_hole(&self) -> i64 {
        let has = |offset: i64| {
            let at = offset.rem_euclid(CHUNK) as usize;
            self.chunks
                .get(&offset.div_euclid(CHUNK))
                .is_some_and(|bits| bits[at / 64] & (1 << (at % 64)) != 0)
        };
        (self.first()..self.end()).find(|offset| !has(*offset)).unwrap_or_else(|| self.end())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn duplicates_and_holes_are_counted() {
        let of = |offsets: &[i64]| {
            let mut origins = Origins::default();
            offsets.iter().for_each(|offset| origins.add(*offset));
            origins
        };
        let none = of(&[]);
        assert_eq!((none.first(), none.end(), none.holes(), none.twice), (0, 0, None, None));
        let mut all: Vec<i64> = (65_000..200_000).rev().collect();
        let whole = of(&all);
        assert_eq!((whole.first(), whole.end(), whole.holes(), whole.twice), (65_000, 200_000, None, None));
        all.retain(|offset| !(131_070..131_075).contains(offset) && *offset != 190_000);
        all.extend([70_000, 66_000, 70_000]);
        let broken = of(&all);
        assert_eq!(broken.holes(), Some((6, 131_070)));
        assert_eq!((broken.duplicates, broken.twice, broken.rows), (3, Some(66_000), 134_997));
    }
}
