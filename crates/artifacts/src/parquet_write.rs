//! Writing Parquet tables through polars: whole or not at all, and with key-value entries in the footer.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, Write};
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};

use polars::error::PolarsError;
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
    let table = DataFrame::new_infer_height(columns)
        .map_err(|e| ArtifactError::write(path, io::Error::other(e)))?;
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
    groups: GroupWriter<File>,
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
        // A second handle on the same file. Unbuffered: polars hands over whole pages.
        let groups = GroupWriter::start(file.handle()?, schema, compression, footer)
            .map_err(|e| ArtifactError::write(path, e))?;
        Ok(Self { file, groups })
    }

    /// Writes rows as one row group.
    pub fn write_row_group(&mut self, rows: &DataFrame) -> Result<()> {
        self.groups
            .write(rows)
            .map_err(|e| ArtifactError::write(self.file.path(), e))
    }

    /// Writes the footer and gives the file its name.
    pub fn finish(self) -> Result<()> {
        self.groups
            .finish()
            .map_err(|e| ArtifactError::write(self.file.path(), e))?;
        self.file.commit()
    }
}

/// Writes row groups to a sink whose errors come back as they were: the library keeps only their text, and a full disk
/// would look like a table that cannot be encoded.
struct GroupWriter<W: Write> {
    writer: BatchedWriter<Watched<W>>,
    refusal: Arc<Mutex<Option<io::Error>>>,
}

impl<W: Write> GroupWriter<W> {
    fn start(
        sink: W,
        schema: &Schema,
        compression: ParquetCompression,
        footer: &Footer,
    ) -> io::Result<Self> {
        let refusal = Arc::default();
        let sink = Watched {
            sink,
            refusal: Arc::clone(&refusal),
        };
        let entries = footer
            .iter()
            .map(|(key, value)| (key.clone(), value.clone()))
            .collect();
        let started = ParquetWriter::new(sink)
            .with_compression(compression)
            .with_key_value_metadata(Some(KeyValueMetadata::from_static(entries)))
            .batched(schema);
        let writer = started.map_err(|e| reason(&refusal, e))?;
        Ok(Self { writer, refusal })
    }

    fn write(&mut self, rows: &DataFrame) -> io::Result<()> {
        let written = self.writer.write_batch(rows);
        written.map_err(|e| reason(&self.refusal, e))
    }

    fn finish(self) -> io::Result<()> {
        let finished = self.writer.finish();
        finished.map(drop).map_err(|e| reason(&self.refusal, e))
    }
}

/// Why a write failed: what the sink said, or else the library.
fn reason(refusal: &Mutex<Option<io::Error>>, error: PolarsError) -> io::Error {
    let refusal = refusal
        .lock()
        .unwrap_or_else(PoisonError::into_inner)
        .take();
    refusal.unwrap_or_else(|| io::Error::other(error))
}

/// A sink that keeps its last error and passes a like one on.
struct Watched<W> {
    sink: W,
    refusal: Arc<Mutex<Option<io::Error>>>,
}

impl<W> Watched<W> {
    fn keep<T>(&self, result: io::Result<T>) -> io::Result<T> {
        result.map_err(|error| {
            let passed = io::Error::new(error.kind(), error.to_string());
            // An interrupted write is tried again by the caller.
            if error.kind() != io::ErrorKind::Interrupted {
                *self.refusal.lock().unwrap_or_else(PoisonError::into_inner) = Some(error);
            }
            passed
        })
    }
}

impl<W: Write> Write for Watched<W> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let result = self.sink.write(bytes);
        self.keep(result)
    }

    fn flush(&mut self) -> io::Result<()> {
        let result = self.sink.flush();
        self.keep(result)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A disk with so many bytes left.
    struct Disk(usize);

    impl Write for Disk {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            let taken = bytes.len().min(self.0);
            self.0 -= taken;
            if taken == 0 && !bytes.is_empty() {
                return Err(io::ErrorKind::StorageFull.into());
            }
            Ok(taken)
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    fn write_to(sink: impl Write) -> io::Result<()> {
        let table =
            DataFrame::new_infer_height(vec![column("step", 0..1000u32)]).expect("one column");
        let compression = ParquetCompression::Uncompressed;
        let mut groups = GroupWriter::start(sink, table.schema(), compression, &Footer::new())?;
        groups.write(&table)?;
        groups.finish()
    }

    #[test]
    fn a_full_disk_is_called_so_wherever_the_table_breaks_off() {
        let mut whole = Vec::new();
        write_to(&mut whole).expect("memory takes it all");
        write_to(Disk(whole.len())).expect("just enough");
        for left in [0, 1, 4, 100, whole.len() / 2, whole.len() - 1] {
            let error = write_to(Disk(left)).expect_err("too little");
            assert_eq!(error.kind(), io::ErrorKind::StorageFull, "{left}");
        }
    }

    #[test]
    #[cfg(target_os = "linux")]
    fn the_systems_own_error_comes_back() {
        let full = File::options()
            .write(true)
            .open("/dev/full")
            .expect("every Linux has it");
        let error = write_to(full).expect_err("it takes no bytes");
        const ENOSPC: i32 = 28;
        assert_eq!(error.raw_os_error(), Some(ENOSPC), "{error}");
    }
}
