//! Files that appear whole or not at all.
//!
//! The bytes go to a temporary file in the same directory, are forced to disk, and take their name by a rename, which the
//! file system does in one step; then the directory is forced to disk too. A reader sees the old file or the new one, and
//! a killed writer leaves at most a `.<name>.….tmp` beside them.

use std::fs::File;
use std::io::{self, BufWriter, Write};
use std::path::{Path, PathBuf};

use tempfile::TempPath;

use crate::error::{ArtifactError, Result};

/// A file in the making: it takes its name at [`Self::commit`], and vanishes if dropped before.
#[derive(Debug)]
pub struct AtomicFile {
    file: File,
    temporary: TempPath,
    path: PathBuf,
}

impl AtomicFile {
    /// Starts a file that will be called `path`. Its directory must exist.
    ///
    /// # Errors
    ///
    /// If the directory takes no new files.
    pub fn create(path: &Path) -> Result<Self> {
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        let prefix = format!(".{name}.");
        let mut builder = tempfile::Builder::new();
        builder.prefix(&prefix).suffix(".tmp");
        #[cfg(unix)]
        {
            // Readable as any new file is (the umask still applies), not for the owner alone as temporary files are.
            use std::os::unix::fs::PermissionsExt as _;
            builder.permissions(std::fs::Permissions::from_mode(0o666));
        }
        let (file, temporary) = builder
            .tempfile_in(directory_of(path))
            .map_err(|e| ArtifactError::write(path, e))?
            .into_parts();
        Ok(Self {
            file,
            temporary,
            path: path.to_path_buf(),
        })
    }

    /// The name that the file will take.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// A second handle on the file, for writers that want to own theirs.
    pub(crate) fn handle(&self) -> Result<File> {
        self.file
            .try_clone()
            .map_err(|e| ArtifactError::write(&self.path, e))
    }

    /// Forces the bytes to disk and gives the file its name, replacing what had it.
    ///
    /// # Errors
    ///
    /// If the disk or the directory refuses; what had the name is then untouched.
    pub fn commit(self) -> Result<()> {
        let path = self.path;
        self.file
            .sync_all()
            .map_err(|e| ArtifactError::write(&path, e))?;
        self.temporary
            .persist(&path)
            .map_err(|e| ArtifactError::write(&path, e.error))?;
        sync_directory(directory_of(&path)).map_err(|e| ArtifactError::write(&path, e))
    }
}

/// Writes a file whole or not at all.
///
/// # Errors
///
/// If `write` fails, or the directory or disk refuses; what had the name is then untouched.
pub fn write_atomically(
    path: &Path,
    write: impl FnOnce(&mut BufWriter<File>) -> io::Result<()>,
) -> Result<()> {
    let file = AtomicFile::create(path)?;
    let mut writer = BufWriter::with_capacity(1 << 20, file.handle()?);
    write(&mut writer)
        .and_then(|()| writer.flush())
        .map_err(|e| ArtifactError::write(path, e))?;
    file.commit()
}

/// Gives a file that never changes a second name, or copies it where the file system has no hard links. Replaces what
/// had the name.
///
/// # Errors
///
/// If the directory or disk refuses.
pub(crate) fn link_or_copy(from: &Path, to: &Path) -> Result<()> {
    match std::fs::remove_file(to) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(ArtifactError::write(to, e)),
        _ => {}
    }
    if std::fs::hard_link(from, to).is_ok() {
        return sync_directory(directory_of(to)).map_err(|e| ArtifactError::write(to, e));
    }
    let mut source = File::open(from).map_err(|e| ArtifactError::io("open", from, e))?;
    write_atomically(to, |target| io::copy(&mut source, target).map(drop))
}

/// The directory that a path's file lies in.
fn directory_of(path: &Path) -> &Path {
    match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    }
}

#[cfg(unix)]
fn sync_directory(dir: &Path) -> io::Result<()> {
    File::open(dir)?.sync_all()
}

#[cfg(not(unix))]
fn sync_directory(_dir: &Path) -> io::Result<()> {
    Ok(()) // Windows has no such call; a rename is durable with the file itself.
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(dir: &Path) -> Vec<String> {
        let mut names: Vec<String> = std::fs::read_dir(dir)
            .expect("a directory")
            .map(|entry| {
                entry
                    .expect("an entry")
                    .file_name()
                    .to_string_lossy()
                    .into_owned()
            })
            .collect();
        names.sort();
        names
    }

    #[test]
    fn a_written_file_has_its_bytes_and_leaves_nothing_beside_it() {
        let dir = tempfile::tempdir().expect("a temporary directory");
        let path = dir.path().join("file.bin");
        write_atomically(&path, |w| w.write_all(b"first")).expect("written");
        write_atomically(&path, |w| w.write_all(b"second")).expect("replaced");
        assert_eq!(std::fs::read(&path).expect("readable"), b"second");
        assert_eq!(names(dir.path()), ["file.bin"]);
    }

    #[test]
    fn a_failed_write_leaves_the_old_file_and_nothing_else() {
        let dir = tempfile::tempdir().expect("a temporary directory");
        let path = dir.path().join("file.bin");
        write_atomically(&path, |w| w.write_all(b"old")).expect("written");
        let failed = write_atomically(&path, |w| {
            w.write_all(b"half of the n")?;
            Err(io::Error::other("the disk is full"))
        });
        assert!(failed.is_err());
        assert_eq!(std::fs::read(&path).expect("readable"), b"old");
        assert_eq!(names(dir.path()), ["file.bin"]);
    }

    #[test]
    fn an_abandoned_file_never_appears() {
        let dir = tempfile::tempdir().expect("a temporary directory");
        let file = AtomicFile::create(&dir.path().join("file.bin")).expect("started");
        assert_eq!(names(dir.path()).len(), 1);
        drop(file);
        assert!(names(dir.path()).is_empty());
    }

    #[cfg(unix)]
    #[test]
    fn others_may_read_a_written_file_as_any_new_file() {
        use std::os::unix::fs::PermissionsExt as _;
        let dir = tempfile::tempdir().expect("a temporary directory");
        let ours = dir.path().join("ours");
        let plain = dir.path().join("plain");
        write_atomically(&ours, |w| w.write_all(b"x")).expect("written");
        std::fs::write(&plain, b"x").expect("written");
        let mode = |path: &Path| std::fs::metadata(path).expect("there").permissions().mode();
        assert_eq!(mode(&ours), mode(&plain));
    }

    #[test]
    fn a_directory_that_refuses_is_named_with_what_to_do() {
        for kind in [
            io::ErrorKind::PermissionDenied,
            io::ErrorKind::ReadOnlyFilesystem,
        ] {
            let error = ArtifactError::write(Path::new("runs/x.parquet"), io::Error::from(kind));
            let text = error.to_string();
            assert!(
                text.contains("runs/x.parquet") && text.contains("read-only"),
                "{text}"
            );
        }
    }

    #[test]
    fn a_directory_that_is_not_there_is_an_error() {
        let dir = tempfile::tempdir().expect("a temporary directory");
        let path = dir.path().join("missing").join("file");
        assert!(matches!(
            write_atomically(&path, |_| Ok(())),
            Err(ArtifactError::Io { .. })
        ));
    }
}
