//! Writing Parquet tables through polars: whole or not at all, and with key-value entries in the footer.

use std::collections::BTreeMap;
use std::fs::File;
use std::path::Path;

use polars::io::parquet::write::{BatchedWriter, KeyValueMetadata};
use polars::prelude::{
    Column, DataFrame, NamedFrom, ParquetCompression, ParquetWriter, Schema, Series,
};

use crate::atomic::AtomicFile;
use crate::error::{ArtifactError, Result};

/// Key-value entries in a table's footer.
pub type Footer = BTreeMap<String, String>;

/// A column of these values; `Option`s make empty cells.
pub(crate) fn column<T, P: ?Sized>(name: &str, values: impl Iterator<Item = T>) -> Column
where
    Series: NamedFrom<Vec<T>, P>,
{
    Series::new(name.into(), values.collect::<Vec<T>>()).into()
}

/// Writes a table of equally long columns, whole or not at all.
pub(crate) fn write_table(path: &Path, columns: Vec<Column>, footer: &Footer) -> Result<()> {
    let table = DataFrame::new_infer_height(columns).map_err(|e| cannot_write(path, e))?;
    let mut writer =
        TableWriter::create(path, table.schema(), ParquetCompression::Zstd(None), footer)?;
    if table.height() > 0 {
        writer.write_row_group(&table)?;
    }
    writer.finish()
}

/// A table in the making, written row group by row group.
pub(crate) struct TableWriter {
    file: AtomicFile,
    // Owns a second handle on the same file. Unbuffered: polars hands over whole pages.
    writer: BatchedWriter<File>,
}

impl TableWriter {
    /// Starts a table with this schema.
    pub fn create(
        path: &Path,
        schema: &Schema,
        compression: ParquetCompression,
        footer: &Footer,
    ) -> Result<Self> {
        let file = AtomicFile::create(path)?;
        let entries = footer
            .iter()
            .map(|(key, value)| (key.clone(), value.clone()))
            .collect();
        let writer = ParquetWriter::new(file.handle()?)
            .with_compression(compression)
            .with_key_value_metadata(Some(KeyValueMetadata::from_static(entries)))
            .batched(schema)
            .map_err(|e| cannot_write(path, e))?;
        Ok(Self { file, writer })
    }

    /// Writes rows as one row group.
    pub fn write_row_group(&mut self, rows: &DataFrame) -> Result<()> {
        self.writer
            .write_batch(rows)
            .map_err(|e| cannot_write(self.file.path(), e))
    }

    /// Writes the footer and gives the file its name.
    pub fn finish(self) -> Result<()> {
        self.writer
            .finish()
            .map_err(|e| cannot_write(self.file.path(), e))?;
        drop(self.writer);
        self.file.commit()
    }
}

fn cannot_write(path: &Path, source: polars::error::PolarsError) -> ArtifactError {
    ArtifactError::Parquet {
        action: "write",
        path: path.to_path_buf(),
        source,
    }
}
