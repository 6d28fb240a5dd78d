//! Whole columns of small tables as vectors, with the type and the empty cells checked.

use std::ops::Range;

use polars_arrow::array::{Array, BooleanArray, PrimitiveArray, Utf8ViewArray};
use polars_arrow::datatypes::{ArrowDataType, Field};
use polars_arrow::types::NativeType;

use super::ParquetFile;
use crate::error::{ArtifactError, ParquetProblem, Result};

/// Text that a column may decode to: a dictionary makes many long equal cells of few bytes.
const MAX_TEXT_BYTES: usize = 1 << 30;

impl ParquetFile {
    /// A text column without empty cells.
    pub fn strings(&self, column: &str) -> Result<Vec<String>> {
        let arrays = self.arrays::<Utf8ViewArray>(column, "text", ArrowDataType::Utf8View)?;
        let num_bytes: usize = arrays.iter().map(|array| array.total_bytes_len()).sum();
        if num_bytes > MAX_TEXT_BYTES {
            return Err(self.damaged(ParquetProblem::Text {
                column: column.to_owned(),
                num_bytes,
                max_bytes: MAX_TEXT_BYTES,
            }));
        }
        let cells = arrays.iter().flat_map(|array| array.iter());
        self.required(column, "text", cells.map(|cell| cell.map(str::to_owned)))
    }

    /// A column of u32 without empty cells.
    pub fn u32s(&self, column: &str) -> Result<Vec<u32>> {
        self.numbers(column, "u32", ArrowDataType::UInt32)
    }

    /// A column of u32 with empty cells.
    pub fn optional_u32s(&self, column: &str) -> Result<Vec<Option<u32>>> {
        let arrays = self.arrays(column, "u32", ArrowDataType::UInt32)?;
        Ok(arrays.iter().flat_map(cells::<u32>).collect())
    }

    /// A column of f32 without empty cells.
    pub fn f32s(&self, column: &str) -> Result<Vec<f32>> {
        self.numbers(column, "f32", ArrowDataType::Float32)
    }

    /// A column of f64 without empty cells.
    pub fn f64s(&self, column: &str) -> Result<Vec<f64>> {
        self.numbers(column, "f64", ArrowDataType::Float64)
    }

    /// A column of yes or no without empty cells.
    pub fn bools(&self, column: &str) -> Result<Vec<bool>> {
        let arrays = self.arrays::<BooleanArray>(column, "bool", ArrowDataType::Boolean)?;
        self.required(column, "bool", arrays.iter().flat_map(|array| array.iter()))
    }

    /// A column's field, if it has exactly this type.
    pub fn typed_field(
        &self,
        column: &str,
        expected: &str,
        dtype: &ArrowDataType,
    ) -> Result<&Field> {
        let field = self.field(column, expected)?;
        if field.dtype == *dtype {
            Ok(field)
        } else {
            Err(self.wrong_type(field, expected))
        }
    }

    /// The error for a column of another type.
    pub fn wrong_type(&self, field: &Field, expected: &str) -> ArtifactError {
        ArtifactError::ColumnType {
            path: self.path.clone(),
            column: field.name.to_string(),
            expected: expected.to_owned(),
            found: describe(&field.dtype),
        }
    }

    /// The error for a cell that may not be as it is.
    pub fn wrong_cell(
        &self,
        column: &str,
        row: usize,
        expected: impl Into<String>,
        found: impl Into<String>,
    ) -> ArtifactError {
        ArtifactError::Cell {
            path: self.path.clone(),
            column: column.to_owned(),
            row,
            expected: expected.into(),
            found: found.into(),
        }
    }

    /// As [`Self::decode`], each array with the type that the field promises.
    pub fn decode_as<A: Array + Clone>(&self, field: &Field, rows: Range<usize>) -> Result<Vec<A>> {
        let arrays = self.decode(field, rows)?;
        arrays
            .iter()
            .map(|array| {
                array.as_any().downcast_ref::<A>().cloned().ok_or_else(|| {
                    self.damaged(ParquetProblem::Undecodable {
                        place: format!("column {:?}", field.name.as_str()),
                        message: format!("it decodes to {}", describe(array.dtype())),
                    })
                })
            })
            .collect()
    }

    /// All of a column, an array for each row group.
    fn arrays<A: Array + Clone>(
        &self,
        column: &str,
        expected: &str,
        dtype: ArrowDataType,
    ) -> Result<Vec<A>> {
        let field = self.typed_field(column, expected, &dtype)?;
        self.check_rows_against_size()?;
        self.decode_as::<A>(field, 0..self.num_rows())
    }

    fn numbers<T: NativeType>(
        &self,
        column: &str,
        expected: &str,
        dtype: ArrowDataType,
    ) -> Result<Vec<T>> {
        let arrays = self.arrays(column, expected, dtype)?;
        self.required(column, expected, arrays.iter().flat_map(cells::<T>))
    }

    /// The cells of a column that may not have empty ones.
    fn required<T>(
        &self,
        column: &str,
        expected: &str,
        cells: impl Iterator<Item = Option<T>>,
    ) -> Result<Vec<T>> {
        let mut values = Vec::with_capacity(self.num_rows());
        for (row, cell) in cells.enumerate() {
            let value =
                cell.ok_or_else(|| self.wrong_cell(column, row, expected, "an empty cell"))?;
            values.push(value);
        }
        Ok(values)
    }
}

fn cells<T: NativeType>(array: &PrimitiveArray<T>) -> impl Iterator<Item = Option<T>> {
    array.iter().map(|cell| cell.copied())
}

/// A column type in words that a person who made the file would use.
fn describe(dtype: &ArrowDataType) -> String {
    match dtype {
        ArrowDataType::Utf8View | ArrowDataType::Utf8 | ArrowDataType::LargeUtf8 => {
            "text".to_owned()
        }
        ArrowDataType::BinaryView | ArrowDataType::Binary | ArrowDataType::LargeBinary => {
            "binary".to_owned()
        }
        ArrowDataType::Boolean => "bool".to_owned(),
        ArrowDataType::UInt8 => "u8".to_owned(),
        ArrowDataType::UInt16 => "u16".to_owned(),
        ArrowDataType::UInt32 => "u32".to_owned(),
        ArrowDataType::UInt64 => "u64".to_owned(),
        ArrowDataType::Int8 => "i8".to_owned(),
        ArrowDataType::Int16 => "i16".to_owned(),
        ArrowDataType::Int32 => "i32".to_owned(),
        ArrowDataType::Int64 => "i64".to_owned(),
        ArrowDataType::Float16 => "f16".to_owned(),
        ArrowDataType::Float32 => "f32".to_owned(),
        ArrowDataType::Float64 => "f64".to_owned(),
        ArrowDataType::List(inner) | ArrowDataType::LargeList(inner) => {
            format!("list of {}", describe(&inner.dtype))
        }
        ArrowDataType::FixedSizeList(inner, length) => {
            format!("list of {length} {}", describe(&inner.dtype))
        }
        ArrowDataType::Struct(fields) => {
            let fields: Vec<String> = fields
                .iter()
                .map(|field| format!("{}: {}", field.name, describe(&field.dtype)))
                .collect();
            format!("struct<{}>", fields.join(", "))
        }
        other => format!("{other:?}"),
    }
}
