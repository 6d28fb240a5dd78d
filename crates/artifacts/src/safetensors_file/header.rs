//! Parsing and checking a safetensors header.

use std::collections::BTreeMap;
use std::fmt;

use serde::Deserialize;
use serde::de::{Error as _, MapAccess, Visitor};

use super::{Dtype, HeaderProblem, TensorInfo};

/// The entry of a header that is not a tensor.
pub(super) const METADATA_KEY: &str = "__metadata__";

/// A checked header.
#[derive(Debug)]
pub(super) struct Header {
    pub metadata: BTreeMap<String, String>,
    pub tensors: BTreeMap<String, Entry>,
    /// Where in the file the data starts; tensors count from here.
    pub data_start: usize,
}

/// One checked tensor: `start..end` are bytes counted from the data's start.
#[derive(Debug)]
pub(super) struct Entry {
    pub info: TensorInfo,
    pub start: usize,
    pub end: usize,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RawEntry {
    dtype: String,
    shape: Vec<u64>,
    data_offsets: [u64; 2],
}

/// The header as it stands there, in its order and with its repetitions.
#[derive(Default)]
struct RawHeader {
    metadata: Option<BTreeMap<String, String>>,
    tensors: Vec<(String, RawEntry)>,
}

impl<'de> Deserialize<'de> for RawHeader {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Entries;
        impl<'de> Visitor<'de> for Entries {
            type Value = RawHeader;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object of tensor entries")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<RawHeader, A::Error> {
                let mut header = RawHeader::default();
                while let Some(name) = map.next_key::<String>()? {
                    if name == METADATA_KEY {
                        if header.metadata.replace(map.next_value()?).is_some() {
                            return Err(A::Error::custom("two __metadata__ entries"));
                        }
                    } else {
                        header.tensors.push((name, map.next_value()?));
                    }
                }
                Ok(header)
            }
        }
        deserializer.deserialize_map(Entries)
    }
}

impl Header {
    /// Reads and checks the header of a file with these bytes.
    pub fn parse(file: &[u8]) -> Result<Self, HeaderProblem> {
        let file_bytes = file.len();
        let (length, rest) = file
            .split_first_chunk::<8>()
            .ok_or(HeaderProblem::TooShort { file_bytes })?;
        let header_bytes = u64::from_le_bytes(*length);
        let (header, data) = usize::try_from(header_bytes)
            .ok()
            .and_then(|length| rest.split_at_checked(length))
            .ok_or(HeaderProblem::HeaderTooLong {
                header_bytes,
                file_bytes,
            })?;
        let raw: RawHeader = serde_json::from_slice(header)?;

        let mut tensors = BTreeMap::new();
        for (name, raw) in raw.tensors {
            let entry = check_entry(&name, raw, data.len())?;
            if tensors.insert(name.clone(), entry).is_some() {
                return Err(HeaderProblem::Duplicate { name });
            }
        }
        check_cover(&tensors, data.len())?;
        Ok(Self {
            metadata: raw.metadata.unwrap_or_default(),
            tensors,
            data_start: 8 + header.len(),
        })
    }
}

fn check_entry(name: &str, raw: RawEntry, data_bytes: usize) -> Result<Entry, HeaderProblem> {
    let name = || name.to_owned();
    let dtype = Dtype::from_name(&raw.dtype).ok_or_else(|| HeaderProblem::Dtype {
        name: name(),
        dtype: raw.dtype,
    })?;
    let sizes: Option<Vec<usize>> = raw.shape.iter().map(|&n| usize::try_from(n).ok()).collect();
    // The sizes are multiplied as they stand, zeros left out, so that no order of them overflows later.
    let countable = |shape: &[usize]| {
        shape
            .iter()
            .filter(|&&n| n != 0)
            .try_fold(dtype.size_bytes(), |bytes, &n| bytes.checked_mul(n))
            .map(|bytes| if shape.contains(&0) { 0 } else { bytes })
    };
    let (shape, expected) = sizes
        .and_then(|shape| countable(&shape).map(|bytes| (shape, bytes)))
        .ok_or_else(|| HeaderProblem::ShapeOverflow {
            name: name(),
            shape: raw.shape,
        })?;

    let [start, end] = raw.data_offsets;
    if start > end || end > data_bytes as u64 {
        return Err(HeaderProblem::OutOfRange {
            name: name(),
            start,
            end,
            data_bytes,
        });
    }
    if end - start != expected as u64 {
        return Err(HeaderProblem::Size {
            name: name(),
            dtype,
            shape,
            expected,
            found: end - start,
        });
    }
    Ok(Entry {
        info: TensorInfo { dtype, shape },
        start: start as usize, // both fit: they are at most data_bytes
        end: end as usize,
    })
}

/// Checks that the tensors cover the data exactly once.
fn check_cover(tensors: &BTreeMap<String, Entry>, data_bytes: usize) -> Result<(), HeaderProblem> {
    let mut by_start: Vec<(&String, &Entry)> = tensors.iter().collect();
    by_start.sort_by_key(|(_, entry)| (entry.start, entry.end));
    let mut covered = 0;
    let mut last: Option<&String> = None;
    for (name, entry) in by_start {
        match last {
            Some(first) if entry.start < covered => {
                return Err(HeaderProblem::Overlap {
                    first: first.clone(),
                    second: name.clone(),
                });
            }
            _ if entry.start > covered => {
                return Err(HeaderProblem::Gap {
                    start: covered,
                    end: entry.start,
                });
            }
            _ => {}
        }
        covered = entry.end;
        last = Some(name);
    }
    if covered != data_bytes {
        return Err(HeaderProblem::Gap {
            start: covered,
            end: data_bytes,
        });
    }
    Ok(())
}
