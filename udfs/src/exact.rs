//! Exact sums of doubles: whatever the order in which values come and go, the sum is the true one, rounded once.
//!
//! Every finite double is an integer times a power of two, so a sum of doubles is one too. [`ExactSum`] keeps it as
//! `digits · 2^exponent` in 128 bits, which holds what people add up (2^70 between the largest and the smallest value, or
//! that many values); a sum that needs more bits moves into an integer as wide as the range of doubles (Kulisch's
//! accumulator). NaN and infinities are counted beside the sum, so that they can be taken back too.
//!
//! Rounding is to nearest, ties to even, when the sum is read. A sum beyond the largest double is infinite when it is
//! read, and finite again once enough is taken back.

/// Exponent of the lowest bit of any double.
const LOWEST: i32 = -1_074;
/// Words of the widest sum: 2,098 bits of doubles, a sign, and room for 2^100 values.
const WORDS: usize = 35;
/// Bytes of a sum that fits 128 bits, as [`ExactSum::write`] writes it.
const NARROW: usize = 20;
/// Bytes of the counts that follow in rare cases, with a byte that says whether a wide sum comes behind.
const COUNTS: usize = 25;

/// The sum of any doubles added so far and not taken back.
#[derive(Debug, Clone, Default)]
pub struct ExactSum {
    /// 0 while the sum is a wide one.
    digits: i128,
    exponent: i32,
    rare: Option<Box<Rare>>,
}

#[derive(Debug, Clone, Default)]
struct Rare {
    wide: Option<Wide>,
    nan: i64,
    positive_infinite: i64,
    negative_infinite: i64,
}

impl ExactSum {
    #[inline]
    pub fn add(&mut self, value: f64) {
        self.add_times(value, 1);
    }

    /// Takes back a value that was added.
    #[inline]
    pub fn remove(&mut self, value: f64) {
        self.add_times(value, -1);
    }

    /// Adds `value` so many times; takes it back where `times` is negative.
    #[inline]
    pub fn add_times(&mut self, value: f64, times: i64) {
        if !value.is_finite() {
            return self.count(value, times);
        }
        let bits = value.to_bits();
        let (raw, fraction) = ((bits >> 52 & 0x7FF) as i32, (bits & ((1 << 52) - 1)) as i64);
        let (mantissa, exponent) =
            if raw == 0 { (fraction, LOWEST) } else { (fraction | 1 << 52, raw - 1_075) };
        let mantissa = if value.is_sign_negative() { -mantissa } else { mantissa };
        // 53 bits times 63 bits.
        self.put(i128::from(mantissa) * i128::from(times), exponent);
    }

    /// Adds all that is in the other sum.
    pub fn merge(&mut self, other: &Self) {
        self.put(other.digits, other.exponent);
        let Some(from) = &other.rare else { return };
        let wide = from.wide.as_ref().map(|from| (from, self.widen()));
        if let Some((from, to)) = wide {
            to.merge(from);
        }
        let to = self.rare.get_or_insert_default();
        to.nan += from.nan;
        to.positive_infinite += from.positive_infinite;
        to.negative_infinite += from.negative_infinite;
    }

    /// The sum, rounded once.
    #[inline]
    pub fn value(&self) -> f64 {
        match &self.rare {
            None => scaled(self.digits as f64, self.exponent),
            Some(rare) => rare.value(self),
        }
    }

    /// Bytes that the sum takes beside itself.
    pub fn size_outside(&self) -> usize {
        if self.rare.is_some() { size_of::<Rare>() } else { 0 }
    }

    #[inline]
    fn put(&mut self, digits: i128, exponent: i32) {
        if digits == 0 {
            return;
        }
        if self.digits == 0 {
            if self.rare.as_ref().is_some_and(|rare| rare.wide.is_some()) {
                return self.widen().add(digits, exponent);
            }
            (self.digits, self.exponent) = (digits, exponent);
            return;
        }
        if !self.put_narrow(digits, exponent) {
            self.put_wide(digits, exponent);
        }
    }

    /// Adds within 128 bits; false, and nothing done, where that is not possible.
    #[inline]
    fn put_narrow(&mut self, digits: i128, exponent: i32) -> bool {
        let sum = if exponent >= self.exponent {
            let digits = shifted(digits, exponent - self.exponent);
            digits.and_then(|digits| self.digits.checked_add(digits)).map(|sum| (sum, self.exponent))
        } else {
            let mine = shifted(self.digits, self.exponent - exponent);
            mine.and_then(|mine| mine.checked_add(digits)).map(|sum| (sum, exponent))
        };
        match sum {
            Some(sum) => {
                (self.digits, self.exponent) = sum;
                true
            }
            None => false,
        }
    }

    /// Adds without zeros at the end, else in the wide sum.
    #[cold]
    fn put_wide(&mut self, digits: i128, exponent: i32) {
        (self.digits, self.exponent) = trimmed(self.digits, self.exponent);
        let (digits, exponent) = trimmed(digits, exponent);
        if self.put_narrow(digits, exponent) {
            return;
        }
        let (mine, at) = (std::mem::take(&mut self.digits), self.exponent);
        let wide = self.widen();
        wide.add(mine, at);
        wide.add(digits, exponent);
    }

    fn widen(&mut self) -> &mut Wide {
        let rare = self.rare.get_or_insert_default();
        let wide = rare.wide.get_or_insert_default();
        if self.digits != 0 {
            wide.add(std::mem::take(&mut self.digits), self.exponent);
        }
        wide
    }

    #[cold]
    fn count(&mut self, value: f64, times: i64) {
        let rare = self.rare.get_or_insert_default();
        let counted = if value.is_nan() {
            &mut rare.nan
        } else if value > 0.0 {
            &mut rare.positive_infinite
        } else {
            &mut rare.negative_infinite
        };
        *counted += times;
        if rare.wide.is_none() && (rare.nan, rare.positive_infinite, rare.negative_infinite) == (0, 0, 0) {
            self.rare = None;
        }
    }

    /// Appends the sum as bytes; equal sums without wide ones have equal bytes. The layout is frozen.
    ///
    /// Little endian: exponent (4 bytes), digits (16); then, where they are needed, the counts of NaN, +inf and −inf (8
    /// each), a byte that is 1 if a wide sum follows, and its 35 words.
    pub fn write(&self, out: &mut Vec<u8>) {
        let (digits, exponent) = trimmed(self.digits, self.exponent);
        out.extend(exponent.to_le_bytes());
        out.extend(digits.to_le_bytes());
        let Some(rare) = &self.rare else { return };
        for count in [rare.nan, rare.positive_infinite, rare.negative_infinite] {
            out.extend(count.to_le_bytes());
        }
        out.push(u8::from(rare.wide.is_some()));
        for word in rare.wide.iter().flat_map(|wide| wide.0) {
            out.extend(word.to_le_bytes());
        }
    }

    /// What [`ExactSum::write`] wrote; `None` for other bytes.
    pub fn read(bytes: &[u8]) -> Option<Self> {
        let exponent = i32::from_le_bytes(bytes.get(..4)?.try_into().ok()?);
        let digits = i128::from_le_bytes(bytes.get(4..NARROW)?.try_into().ok()?);
        // Trimmed digits are those of a sum of doubles.
        if !(LOWEST..=1_100).contains(&exponent) {
            return None;
        }
        let mut sum = Self { digits, exponent, rare: None };
        let rest = &bytes[NARROW..];
        if rest.is_empty() {
            return Some(sum);
        }
        let word = |at: usize| Some(i64::from_le_bytes(rest.get(at * 8..at * 8 + 8)?.try_into().ok()?));
        let (nan, positive_infinite, negative_infinite) = (word(0)?, word(1)?, word(2)?);
        let wide = match (rest.get(24)?, rest.len()) {
            (0, COUNTS) => None,
            (1, len) if len == COUNTS + WORDS * 8 && digits == 0 => {
                let mut words = [0; WORDS];
                for (word, bytes) in words.iter_mut().zip(rest[COUNTS..].chunks_exact(8)) {
                    *word = u64::from_le_bytes(bytes.try_into().ok()?);
                }
                Some(Wide(words))
            }
            _ => return None,
        };
        sum.rare = Some(Box::new(Rare { wide, nan, positive_infinite, negative_infinite }));
        Some(sum)
    }
}

impl Rare {
    fn value(&self, sum: &ExactSum) -> f64 {
        if self.nan != 0 || self.positive_infinite != 0 && self.negative_infinite != 0 {
            f64::NAN
        } else if self.positive_infinite != 0 {
            f64::INFINITY
        } else if self.negative_infinite != 0 {
            f64::NEG_INFINITY
        } else {
            match &self.wide {
                Some(wide) => wide.value(),
                None => scaled(sum.digits as f64, sum.exponent),
            }
        }
    }
}

/// `digits · 2^by`, if that fits.
#[inline]
fn shifted(digits: i128, by: i32) -> Option<i128> {
    let moved = digits.checked_shl(by as u32)?;
    (moved >> by == digits).then_some(moved)
}

/// The same number without zeros at the end of its digits; 0 has the exponent 0.
fn trimmed(digits: i128, exponent: i32) -> (i128, i32) {
    match digits {
        0 => (0, 0),
        _ => (digits >> digits.trailing_zeros(), exponent + digits.trailing_zeros() as i32),
    }
}

/// `value · 2^by`: exact, or infinite. `value` has 53 significant bits, and is an integer, so that a result below the
/// normal numbers has no bits to lose.
#[inline]
fn scaled(value: f64, by: i32) -> f64 {
    let power = |exponent: i32| f64::from_bits(((exponent + 1_023) as u64) << 52);
    // One power of two alone may be out of range although the result is not.
    value * power(by / 2) * power(by - by / 2)
}

/// An integer in two's complement, lowest word first; its lowest bit counts 2^[`LOWEST`].
#[derive(Debug, Clone)]
struct Wide([u64; WORDS]);

impl Default for Wide {
    fn default() -> Self {
        Self([0; WORDS])
    }
}

impl Wide {
    fn add(&mut self, digits: i128, exponent: i32) {
        let at = (exponent - LOWEST) as usize;
        let (first, bit) = (at / 64, at % 64);
        let low = (digits as u128) << bit;
        let high = if bit == 0 { digits >> 127 } else { digits >> (128 - bit) };
        let parts = [low as u64, (low >> 64) as u64, high as u64];
        let sign = (digits >> 127) as u64;
        let mut carry = false;
        for (place, word) in self.0[first..].iter_mut().enumerate() {
            let part = parts.get(place).copied().unwrap_or(sign);
            // The sign with this carry changes no word.
            if place >= parts.len() && carry == (sign != 0) {
                break;
            }
            (*word, carry) = adding(*word, part, carry);
        }
    }

    fn merge(&mut self, other: &Self) {
        let mut carry = false;
        for (word, part) in self.0.iter_mut().zip(other.0) {
            (*word, carry) = adding(*word, part, carry);
        }
    }

    fn value(&self) -> f64 {
        let negative = self.0[WORDS - 1] >> 63 == 1;
        let mut size = self.clone();
        if negative {
            let mut carry = true;
            for word in &mut size.0 {
                (*word, carry) = adding(!*word, 0, carry);
            }
        }
        let Some(top) = size.0.iter().rposition(|word| *word != 0) else { return 0.0 };
        let zeros = size.0[top].leading_zeros();
        let word = |down: usize| top.checked_sub(down).map_or(0, |at| size.0[at]);
        let leading = (u128::from(word(0)) << 64 | u128::from(word(1))) << zeros;
        let next = u128::from(word(2)).checked_shl(zeros).map_or(0, |bits| bits >> 64);
        // The 128 leading bits; the lowest one stands for all bits below, which is enough to round by.
        let below = size.0[..top.saturating_sub(1)].iter().any(|word| *word != 0);
        let leading = leading | next | u128::from(below);
        let exponent = LOWEST + 64 * (top as i32 - 1) - zeros as i32;
        // A number with bits below the doubles' lowest does not exist, so a small one is exact.
        let value = if exponent < LOWEST {
            let by = (LOWEST - exponent) as u32;
            scaled((leading >> by) as f64, LOWEST)
        } else {
            scaled(leading as f64, exponent)
        };
        if negative { -value } else { value }
    }
}

fn adding(a: u64, b: u64, carry: bool) -> (u64, bool) {
    let (sum, first) = a.overflowing_add(b);
    let (sum, second) = sum.overflowing_add(u64::from(carry));
    (sum, first | second)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// SplitMix64.
    struct Random(u64);

    impl Random {
        fn next(&mut self) -> u64 {
            self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
            let mut z = self.0;
            z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
            z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
            z ^ (z >> 31)
        }

        /// Of any size, or of sizes near each other.
        fn double(&mut self, near: bool) -> f64 {
            if near {
                return (self.next() % 2_000_001) as f64 / 100.0 - 10_000.0;
            }
            loop {
                let value = f64::from_bits(self.next());
                if value.is_finite() {
                    return value;
                }
            }
        }
    }

    fn sum(values: &[f64]) -> ExactSum {
        let mut sum = ExactSum::default();
        values.iter().for_each(|value| sum.add(*value));
        sum
    }

    /// The sum by the wide integer alone.
    fn wide(values: &[f64]) -> f64 {
        let mut sum = ExactSum::default();
        sum.widen();
        values.iter().for_each(|value| sum.add(*value));
        sum.value()
    }

    /// The same by other means: of doubles that are multiples of 2^-40 and below 2^60.
    fn by_integers(values: &[f64]) -> f64 {
        let total: i128 = values.iter().map(|value| (value * f64::from(1 << 30) * 1_024.0) as i128).sum();
        total as f64 / f64::from(1 << 30) / 1_024.0
    }

    #[test]
    fn sums_are_those_of_integers() {
        let mut random = Random(1);
        for _ in 0..2_000 {
            let one = |random: &mut Random| {
                let size = random.next() % 50;
                ((random.next() >> (8 + size)) as i64 - (1 << 40)) as f64 / f64::from(1 << 30) / 1_024.0
            };
            let values: Vec<f64> = (0..random.next() % 40).map(|_| one(&mut random)).collect();
            assert_eq!(sum(&values).value(), by_integers(&values), "{values:?}");
            assert_eq!(wide(&values), by_integers(&values), "{values:?}");
        }
    }

    #[test]
    fn the_order_does_not_matter_and_what_is_taken_back_leaves_no_trace() {
        let mut random = Random(2);
        for round in 0..2_000 {
            let near = round % 2 == 0;
            let mut values: Vec<f64> = (0..1 + random.next() % 30).map(|_| random.double(near)).collect();
            let expected = sum(&values);
            assert_eq!(expected.value().to_bits(), wide(&values).to_bits(), "{values:?}");
            for at in (1..values.len()).rev() {
                values.swap(at, random.next() as usize % (at + 1));
            }
            let split = random.next() as usize % values.len();
            let (mut first, second) = (sum(&values[..split]), sum(&values[split..]));
            first.merge(&second);
            assert_eq!(first.value().to_bits(), expected.value().to_bits(), "{values:?} at {split}");
            values[split..].iter().for_each(|value| first.remove(*value));
            assert_eq!(first.value().to_bits(), sum(&values[..split]).value().to_bits(), "{values:?}");
            let mut bytes = Vec::new();
            expected.write(&mut bytes);
            let read = ExactSum::read(&bytes).unwrap();
            assert_eq!(read.value().to_bits(), expected.value().to_bits());
        }
    }

    #[test]
    fn rounding_is_to_nearest_with_ties_to_even() {
        let tiny = f64::from_bits(1);
        let cases: [(&[f64], f64); 10] = [
            (&[], 0.0),
            (&[0.1, 0.2, 0.3], 0.6),
            (&[1e16, 1.0], 1e16),
            (&[1e16, 1.0, 1e-300], 1e16 + 2.0),
            (&[1e16, 3.0], 1e16 + 4.0),
            (&[1e16, 3.0, -1e-300], 1e16 + 2.0),
            (&[1e308, 1e308, -1e308], 1e308),
            (&[f64::MAX, f64::MAX], f64::INFINITY),
            (&[1e308, tiny, -1e308], tiny),
            (&[f64::MIN_POSITIVE, -tiny], f64::MIN_POSITIVE - tiny),
        ];
        for (values, expected) in cases {
            assert_eq!(sum(values).value(), expected, "{values:?}");
            assert_eq!(wide(values), expected, "{values:?}");
        }
    }

    #[test]
    fn odd_values_are_counted_and_can_be_taken_back() {
        let mut sum = sum(&[0.25, f64::INFINITY]);
        assert_eq!(sum.value(), f64::INFINITY);
        sum.add(f64::NEG_INFINITY);
        assert!(sum.value().is_nan());
        sum.remove(f64::INFINITY);
        assert_eq!(sum.value(), f64::NEG_INFINITY);
        sum.add(f64::NAN);
        let mut bytes = Vec::new();
        sum.write(&mut bytes);
        let mut read = ExactSum::read(&bytes).unwrap();
        assert!(read.value().is_nan());
        read.remove(f64::NAN);
        read.remove(f64::NEG_INFINITY);
        assert_eq!(read.value(), 0.25);
        read.add_times(0.1, 3);
        assert_eq!(read.value(), 0.25 + 0.3);
    }

    #[test]
    fn other_bytes_are_refused() {
        let mut bytes = Vec::new();
        sum(&[1e300, 1e-300, f64::NAN]).write(&mut bytes);
        for length in 0..bytes.len() {
            let complete = ExactSum::read(&bytes[..length]);
            assert!(complete.is_none() || length == NARROW, "{length}");
        }
        let mut random = Random(3);
        for _ in 0..2_000 {
            let noise: Vec<u8> = (0..random.next() % 400).map(|_| random.next() as u8).collect();
            if let Some(sum) = ExactSum::read(&noise) {
                sum.value();
            }
        }
    }
}
