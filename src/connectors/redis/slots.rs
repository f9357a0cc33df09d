//! The slot of a Redis Cluster that a key lies in, and the name of a bookkeeping hash for each slot. Pure.

use std::sync::LazyLock;

use super::BOOK_PREFIX;

/// Slots of every cluster.
pub(super) const SLOTS: usize = 16_384;

/// CRC-16/XMODEM of each byte.
const TABLE: [u16; 256] = table();

const fn table() -> [u16; 256] {
    let mut table = [0; 256];
    let mut byte = 0;
    while byte < 256 {
        let (mut crc, mut bit) = ((byte as u16) << 8, 0);
        while bit < 8 {
            crc = if crc & 0x8000 == 0 { crc << 1 } else { (crc << 1) ^ 0x1021 };
            bit += 1;
        }
        table[byte] = crc;
        byte += 1;
    }
    table
}

/// The slot of a key: of what stands between its first `{` and the next `}`, if that is anything, else of the whole key.
pub(super) fn slot_of(key: &[u8]) -> u16 {
    let tag = key.iter().position(|byte| *byte == b'{').and_then(|open| {
        let rest = &key[open + 1..];
        rest.iter().position(|byte| *byte == b'}').filter(|close| *close > 0).map(|close| &rest[..close])
    });
    let step = |crc: u16, byte: &u8| (crc << 8) ^ TABLE[usize::from((crc >> 8) as u8 ^ byte)];
    tag.unwrap_or(key).iter().fold(0, step) % SLOTS as u16
}

/// For each slot the smallest number whose text lies in it.
static TAGS: LazyLock<Vec<u32>> = LazyLock::new(|| {
    let mut tags = vec![None; SLOTS];
    let mut missing = SLOTS;
    for number in 0_u32.. {
        let tag = &mut tags[usize::from(slot_of(number.to_string().as_bytes()))];
        if tag.is_none() {
            *tag = Some(number);
            missing -= 1;
            if missing == 0 {
                break;
            }
        }
    }
    tags.into_iter().flatten().collect()
});

/// Names of the bookkeeping hashes of `<pipeline>/<sink>`, by slot. Other than that of a single server each has the tag in
/// front, so that names cannot move it to another slot; users with rights to `millstream:{*}` have them to these too.
pub(super) fn books(name: &str) -> Vec<String> {
    TAGS.iter().map(|tag| format!("{BOOK_PREFIX}{tag}}}{name}}}")).collect()
}

#[cfg(test)]
mod tests {
    use redis::cluster_routing::Slot;

    use super::*;

    /// Against the driver's own.
    #[test]
    fn slots_are_those_of_every_client() {
        assert_eq!(slot_of(b"123456789"), 0x31c3 % SLOTS as u16);
        let odd =
            ["", "{", "}", "{}", "a{}b{c}", "{{x}}", "x{y}z{w}", "}{a}", "user:{42}:x", "features:user:42"];
        let numbers = (0..2_000).map(|number| format!("user:{number}"));
        for key in odd.into_iter().map(str::to_owned).chain(numbers) {
            assert_eq!(Slot::new(slot_of(key.as_bytes())), Some(Slot::for_key(&key)), "{key}");
        }
    }

    #[test]
    fn every_slot_has_a_book_of_its_own() {
        let books = books("a{b}c/}{");
        assert_eq!(books.len(), SLOTS);
        for (slot, book) in books.iter().enumerate() {
            assert_eq!(usize::from(slot_of(book.as_bytes())), slot, "{book}");
            assert!(book.starts_with(BOOK_PREFIX) && book.ends_with('}'), "{book}");
        }
    }
}
