//! Hash index over key values → dense slot.
//!
//! Slots are handed out in order of first appearance, 0, 1, 2 …, and never reused. Two rows share a slot iff their
//! key values are equal; NULL equals NULL, −0 equals +0, NaN equals NaN.
//!
//! A single integer or timestamp key takes a fast path over plain `i64`s. Everything else goes through arrow's row
//! format, whose bytes may change between releases: they live in memory only and are never stored.

use std::sync::Arc;

use arrow::array::{Array, ArrayRef, AsArray, Int64Array, NullBufferBuilder, make_array};
use arrow::buffer::ScalarBuffer;
use arrow::compute::cast;
use arrow::datatypes::{DataType, Float32Type, Float64Type, Int64Type};
use arrow::row::{RowConverter, Rows, SortField};
use hashbrown::HashTable;
use hashbrown::hash_table::Entry;

use super::keys::{canonical_float, check_key_type, flatten};
use crate::error::{Error, Result};

/// What [`KeyIndex::lookup`] answers for a key that has no slot.
pub const NO_SLOT: u32 = u32::MAX;

/// Key values → dense slots; see the module.
pub struct KeyIndex {
    types: Vec<DataType>,
    /// Slot → hash, so that growing the table never touches the keys.
    hashes: Vec<u64>,
    table: HashTable<u32>,
    keys: Keys,
}

enum Keys {
    /// No key column: one key, once it was seen.
    Unit,
    /// Slot → value; the slot of NULL, if any, holds 0.
    Integers {
        values: Vec<i64>,
        null: Option<u32>,
    },
    Rows(RowKeys),
}

struct RowKeys {
    converter: RowConverter,
    /// Slot → key.
    stored: Rows,
    /// The batch at hand; kept for its allocation.
    batch: Rows,
}

/// The high bits of the hash are the key group: within a shard they hardly differ, and hashbrown tags its entries
/// with the top seven bits. Turning the hash gives it fresh ones.
#[inline]
fn table_hash(hash: u64) -> u64 {
    hash.rotate_left(32)
}

impl KeyIndex {
    /// # Errors
    /// User: a type cannot be a key (see [`check_key_type`]).
    pub fn new(types: &[DataType]) -> Result<Self> {
        types.iter().try_for_each(check_key_type)?;
        let keys = match types {
            [] => Keys::Unit,
            [only] if is_integer(only) => Keys::Integers { values: Vec::new(), null: None },
            _ => {
                let fields = types.iter().map(|t| SortField::new(plain(t).clone())).collect();
                let converter = RowConverter::new(fields)?;
                let (stored, batch) = (converter.empty_rows(0, 0), converter.empty_rows(0, 0));
                Keys::Rows(RowKeys { converter, stored, batch })
            }
        };
        Ok(Self { types: types.to_vec(), hashes: Vec::new(), table: HashTable::new(), keys })
    }

    /// Number of keys, and the next slot to be handed out.
    pub fn len(&self) -> usize {
        self.hashes.len()
    }

    pub fn is_empty(&self) -> bool {
        self.hashes.is_empty()
    }

    /// Hash of each slot's key, by which it is found again after a restart.
    pub fn hashes(&self) -> &[u64] {
        &self.hashes
    }

    /// Bytes of memory held.
    pub fn size(&self) -> usize {
        let keys = match &self.keys {
            Keys::Unit => 0,
            Keys::Integers { values, .. } => values.capacity() * size_of::<i64>(),
            Keys::Rows(rows) => rows.stored.size() + rows.batch.size(),
        };
        keys + self.hashes.capacity() * size_of::<u64>() + self.table.allocation_size()
    }

    /// Gives each row its key's slot, new keys the next free ones; `slots` is cleared first. `hashes` are those of
    /// [`hash_keys`](super::keys::hash_keys) over the same columns. Returns the number of new keys.
    ///
    /// # Errors
    /// Internal: other column types or lengths than declared; more than 2³² − 1 keys.
    pub fn intern(&mut self, columns: &[ArrayRef], hashes: &[u64], slots: &mut Vec<u32>) -> Result<usize> {
        self.check(columns, hashes)?;
        let before = self.hashes.len();
        if before + hashes.len() > NO_SLOT as usize {
            return Err(Error::internal("a shard holds more than 4,294,967,295 keys")
                .hint("Run the pipeline with a higher --parallelism."));
        }
        slots.clear();
        slots.reserve(hashes.len());
        let Self { hashes: known, table, keys, .. } = self;
        match keys {
            Keys::Unit => {
                if known.is_empty() {
                    known.extend(hashes.first());
                }
                slots.resize(hashes.len(), 0);
            }
            Keys::Integers { values, null } => {
                intern_integers(&columns[0], hashes, slots, (known, table, values, null))?;
            }
            Keys::Rows(rows) => {
                rows.load(columns)?;
                let RowKeys { stored, batch, .. } = rows;
                for (row, &hash) in hashes.iter().enumerate() {
                    let key = batch.row(row);
                    let same = |slot: &u32| {
                        known[*slot as usize] == hash && stored.row(*slot as usize).data() == key.data()
                    };
                    match table.entry(table_hash(hash), same, |slot| table_hash(known[*slot as usize])) {
                        Entry::Occupied(found) => slots.push(*found.get()),
                        Entry::Vacant(free) => {
                            let slot = known.len() as u32;
                            free.insert(slot);
                            known.push(hash);
                            stored.push(key);
                            slots.push(slot);
                        }
                    }
                }
            }
        }
        Ok(self.hashes.len() - before)
    }

    /// Each row's slot, [`NO_SLOT`] for keys not seen; `slots` is cleared first.
    ///
    /// # Errors
    /// Internal: other column types or lengths than declared.
    pub fn lookup(&self, columns: &[ArrayRef], hashes: &[u64], slots: &mut Vec<u32>) -> Result<()> {
        self.check(columns, hashes)?;
        slots.clear();
        slots.reserve(hashes.len());
        let Self { hashes: known, table, keys, .. } = self;
        match keys {
            Keys::Unit => slots.resize(hashes.len(), if known.is_empty() { NO_SLOT } else { 0 }),
            Keys::Integers { values, null } => {
                let (wanted, nulls) = integers(&columns[0])?;
                for (row, (&hash, value)) in hashes.iter().zip(wanted.iter()).enumerate() {
                    let found = if nulls.as_ref().is_some_and(|nulls| nulls.is_null(row)) {
                        null.as_ref()
                    } else {
                        table.find(table_hash(hash), |slot| values[*slot as usize] == *value)
                    };
                    slots.push(found.copied().unwrap_or(NO_SLOT));
                }
            }
            Keys::Rows(rows) => {
                let columns = columns.iter().map(canonical).collect::<Result<Vec<_>>>()?;
                let wanted = rows.converter.convert_columns(&columns)?;
                for (row, &hash) in hashes.iter().enumerate() {
                    let key = wanted.row(row);
                    let same = |slot: &u32| {
                        known[*slot as usize] == hash && rows.stored.row(*slot as usize).data() == key.data()
                    };
                    slots.push(table.find(table_hash(hash), same).copied().unwrap_or(NO_SLOT));
                }
            }
        }
        Ok(())
    }

    /// The key columns of the given slots, in that order, in the declared types.
    ///
    /// # Errors
    /// Internal: a slot that was never handed out.
    pub fn keys(&self, slots: &[u32]) -> Result<Vec<ArrayRef>> {
        if let Some(slot) = slots.iter().find(|slot| **slot as usize >= self.hashes.len()) {
            return Err(Error::internal(format!("key slot {slot} of {} was asked for", self.hashes.len())));
        }
        match &self.keys {
            Keys::Unit => Ok(Vec::new()),
            Keys::Integers { values, null } => {
                let wanted: Vec<i64> = slots.iter().map(|slot| values[*slot as usize]).collect();
                let mut nulls = NullBufferBuilder::new(slots.len());
                if let Some(null) = null {
                    slots.iter().for_each(|slot| nulls.append(slot != null));
                }
                let array = Int64Array::new(wanted.into(), nulls.finish());
                Ok(vec![from_integers(array, &self.types[0])?])
            }
            Keys::Rows(rows) => {
                let wanted = slots.iter().map(|slot| rows.stored.row(*slot as usize));
                let columns = rows.converter.convert_rows(wanted)?;
                let typed = columns.into_iter().zip(&self.types).map(|(column, declared)| {
                    if column.data_type() == declared { Ok(column) } else { Ok(cast(&column, declared)?) }
                });
                typed.collect()
            }
        }
    }

    fn check(&self, columns: &[ArrayRef], hashes: &[u64]) -> Result<()> {
        let same = columns.len() == self.types.len()
            && columns.iter().zip(&self.types).all(|(c, t)| c.data_type() == t && c.len() == hashes.len());
        if same {
            Ok(())
        } else {
            Err(Error::internal("key columns do not have the declared types and length"))
        }
    }
}

impl RowKeys {
    /// Puts the batch's keys, in canonical form, into `self.batch`.
    fn load(&mut self, columns: &[ArrayRef]) -> Result<()> {
        let columns = columns.iter().map(canonical).collect::<Result<Vec<_>>>()?;
        self.batch.clear();
        Ok(self.converter.append(&mut self.batch, &columns)?)
    }
}

type IntegerIndex<'a> = (&'a mut Vec<u64>, &'a mut HashTable<u32>, &'a mut Vec<i64>, &'a mut Option<u32>);

fn intern_integers(
    column: &ArrayRef,
    hashes: &[u64],
    slots: &mut Vec<u32>,
    (known, table, values, null): IntegerIndex<'_>,
) -> Result<()> {
    let (wanted, nulls) = integers(column)?;
    for (row, (&hash, &value)) in hashes.iter().zip(wanted.iter()).enumerate() {
        if nulls.as_ref().is_some_and(|nulls| nulls.is_null(row)) {
            let slot = *null.get_or_insert_with(|| {
                known.push(hash);
                values.push(0);
                (known.len() - 1) as u32
            });
            slots.push(slot);
            continue;
        }
        let same = |slot: &u32| values[*slot as usize] == value;
        match table.entry(table_hash(hash), same, |slot| table_hash(known[*slot as usize])) {
            Entry::Occupied(found) => slots.push(*found.get()),
            Entry::Vacant(free) => {
                let slot = known.len() as u32;
                free.insert(slot);
                known.push(hash);
                values.push(value);
                slots.push(slot);
            }
        }
    }
    Ok(())
}

/// Types whose values are held as `i64` one to one.
fn is_integer(data_type: &DataType) -> bool {
    use DataType::*;
    matches!(data_type, Int8 | Int16 | Int32 | Int64 | UInt8 | UInt16 | UInt32 | UInt64 | Timestamp(..))
}

/// The column's values as `i64`, without a copy where they are 64 bits wide, and its nulls.
fn integers(column: &ArrayRef) -> Result<(ScalarBuffer<i64>, Option<arrow::buffer::NullBuffer>)> {
    let wide = match column.data_type() {
        DataType::Int64 => Arc::clone(column),
        DataType::UInt64 | DataType::Timestamp(..) => {
            make_array(column.to_data().into_builder().data_type(DataType::Int64).build()?)
        }
        _ => cast(column, &DataType::Int64)?,
    };
    let wide = wide.as_primitive::<Int64Type>();
    let nulls = wide.nulls().filter(|nulls| nulls.null_count() > 0).cloned();
    Ok((wide.values().clone(), nulls))
}

fn from_integers(array: Int64Array, to: &DataType) -> Result<ArrayRef> {
    Ok(match to {
        DataType::Int64 => Arc::new(array),
        DataType::UInt64 | DataType::Timestamp(..) => {
            make_array(array.into_data().into_builder().data_type(to.clone()).build()?)
        }
        _ => cast(&array, to)?,
    })
}

/// The type without a dictionary around it.
fn plain(data_type: &DataType) -> &DataType {
    match data_type {
        DataType::Dictionary(_, values) => plain(values),
        other => other,
    }
}

/// Equal keys in equal bytes: no dictionaries, one zero, one NaN.
fn canonical(column: &ArrayRef) -> Result<ArrayRef> {
    Ok(match column.data_type() {
        DataType::Dictionary(..) => canonical(&flatten(column)?)?,
        DataType::Float64 => {
            Arc::new(column.as_primitive::<Float64Type>().unary::<_, Float64Type>(canonical_float))
        }
        DataType::Float32 => {
            let narrow = |v: f32| canonical_float(f64::from(v)) as f32;
            Arc::new(column.as_primitive::<Float32Type>().unary::<_, Float32Type>(narrow))
        }
        _ => Arc::clone(column),
    })
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use arrow::array::*;
    use arrow::datatypes::TimeUnit;

    use super::super::keys::{hash_keys, mix};
    use super::*;

    struct Random(u64);

    impl Random {
        fn below(&mut self, n: u64) -> u64 {
            self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
            mix(self.0) % n
        }
    }

    /// Random columns with many repeats and nulls.
    fn column(random: &mut Random, data_type: &DataType, rows: usize) -> ArrayRef {
        let draws: Int64Array =
            (0..rows).map(|_| Some(random.below(120) as i64).filter(|v| *v < 110)).collect();
        let draws: ArrayRef = Arc::new(draws);
        match data_type {
            DataType::Float64 => {
                let odd = |v: i64| match v {
                    0 => -0.0,
                    1 => 0.0,
                    2 => f64::NAN,
                    3 => -f64::NAN,
                    _ => v as f64 / 4.0,
                };
                Arc::new(draws.as_primitive::<Int64Type>().unary::<_, Float64Type>(odd))
            }
            other => cast(&draws, other).unwrap(),
        }
    }

    fn text(columns: &[ArrayRef], row: usize) -> Vec<Option<String>> {
        let cell = |column: &ArrayRef| {
            let plain = canonical(column).unwrap();
            plain.is_valid(row).then(|| arrow::util::display::array_value_to_string(&plain, row).unwrap())
        };
        columns.iter().map(cell).collect()
    }

    #[test]
    fn agrees_with_a_hash_map() {
        use DataType::*;
        let dictionary = Dictionary(Box::new(Int32), Box::new(Utf8));
        let utc = Timestamp(TimeUnit::Microsecond, Some("UTC".into()));
        let shapes = [
            vec![],
            vec![Int64],
            vec![Int32],
            vec![UInt8],
            vec![UInt64],
            vec![utc.clone()],
            vec![Utf8],
            vec![Utf8View],
            vec![Float64],
            vec![dictionary.clone()],
            vec![Date32],
            vec![Int64, Utf8],
            vec![dictionary, Float64, utc],
        ];
        for (seed, types) in shapes.iter().enumerate() {
            println!("seed {seed}");
            let mut random = Random(seed as u64);
            let mut index = KeyIndex::new(types).unwrap();
            let mut oracle: HashMap<Vec<Option<String>>, u32> = HashMap::new();
            let mut by_slot = Vec::new();
            let (mut hashes, mut slots) = (Vec::new(), Vec::new());
            for _ in 0..20 {
                let rows = random.below(200) as usize;
                let columns: Vec<ArrayRef> = types.iter().map(|t| column(&mut random, t, rows)).collect();
                hash_keys(&columns, rows, &mut hashes).unwrap();
                index.lookup(&columns, &hashes, &mut slots).unwrap();
                for (row, slot) in slots.iter().enumerate() {
                    let expected = oracle.get(&text(&columns, row)).copied().unwrap_or(NO_SLOT);
                    assert_eq!(*slot, expected, "{types:?}");
                }
                let new = index.intern(&columns, &hashes, &mut slots).unwrap();
                let before = oracle.len();
                assert_eq!(slots.len(), rows);
                for (row, slot) in slots.iter().enumerate() {
                    let key = text(&columns, row);
                    let next = oracle.len() as u32;
                    let expected = *oracle.entry(key.clone()).or_insert_with(|| {
                        by_slot.push(key);
                        next
                    });
                    assert_eq!(*slot, expected, "{types:?}");
                }
                assert_eq!(new, oracle.len() - before);
                assert_eq!(index.len(), oracle.len());
            }
            assert_keys(&index, types, &by_slot);
        }
    }

    fn assert_keys(index: &KeyIndex, types: &[DataType], by_slot: &[Vec<Option<String>>]) {
        let backwards: Vec<u32> = (0..by_slot.len() as u32).rev().collect();
        let columns = index.keys(&backwards).unwrap();
        assert_eq!(columns.iter().map(|c| c.data_type().clone()).collect::<Vec<_>>(), types);
        for (row, key) in by_slot.iter().rev().enumerate() {
            assert_eq!(&text(&columns, row), key);
        }
        let mut hashes = Vec::new();
        hash_keys(&columns, backwards.len(), &mut hashes).unwrap();
        assert!(hashes.iter().rev().eq(index.hashes()));
        assert!(index.keys(&[by_slot.len() as u32]).is_err());
        assert!(index.size() > 0);
    }

    #[test]
    fn extreme_integers_stay_apart() {
        let mut index = KeyIndex::new(&[DataType::UInt64]).unwrap();
        let values: ArrayRef =
            Arc::new(UInt64Array::from(vec![Some(u64::MAX), None, Some(0), Some(1 << 63)]));
        let (mut hashes, mut slots) = (Vec::new(), Vec::new());
        hash_keys(&[Arc::clone(&values)], 4, &mut hashes).unwrap();
        assert_eq!(index.intern(&[Arc::clone(&values)], &hashes, &mut slots).unwrap(), 4);
        assert_eq!(&index.keys(&slots).unwrap()[0], &values);
    }

    #[test]
    fn colliding_hashes_are_told_apart_by_their_keys() {
        for values in [
            Arc::new(Int64Array::from(vec![1, 2, 1])) as ArrayRef,
            Arc::new(StringArray::from(vec!["a", "b", "a"])),
        ] {
            let mut index = KeyIndex::new(&[values.data_type().clone()]).unwrap();
            let mut slots = Vec::new();
            assert_eq!(index.intern(&[values], &[9, 9, 9], &mut slots).unwrap(), 2);
            assert_eq!(slots, [0, 1, 0]);
        }
    }

    #[test]
    fn refuses_other_types_than_declared() {
        let mut index = KeyIndex::new(&[DataType::Int64]).unwrap();
        let narrow: ArrayRef = Arc::new(Int32Array::from(vec![1]));
        assert!(index.intern(&[narrow], &[1], &mut Vec::new()).is_err());
        assert!(KeyIndex::new(&[DataType::new_list(DataType::Int64, true)]).is_err());
    }
}
