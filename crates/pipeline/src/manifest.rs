//! The seal of an artifact directory: what it was made from, what it holds, when and by which version.

use std::collections::BTreeMap;
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::context::StageReport;
use crate::fingerprint::Fingerprint;
use crate::stage::{Stage, files};

/// Name of the seal; written last.
pub const MANIFEST_FILE: &str = "manifest.json";
/// Name of the list of source files (`ingest` only), kept apart because it can be long.
pub(crate) const SOURCES_FILE: &str = "sources.json";
/// Version of the manifest's own layout.
const MANIFEST_VERSION: u32 = 1;

/// The content of `manifest.json`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Manifest {
    /// Version of this layout.
    pub manifest_version: u32,
    /// The stage.
    pub stage: Stage,
    /// Name of the recipe; a label.
    pub recipe_name: String,
    /// BLAKE3 of the components.
    pub fingerprint: Fingerprint,
    /// What the result depends on.
    pub components: BTreeMap<String, String>,
    /// Logical digests of the result by the names in [`crate::outputs`].
    pub outputs: BTreeMap<String, String>,
    /// Files of the artifact (relative, `/`) with their sizes in bytes; checkpoints and hidden files are left out.
    pub files: BTreeMap<String, u64>,
    /// When it was sealed, UTC.
    pub created: String,
    /// The same in milliseconds since 1970, to tell which is newest.
    pub created_unix_ms: u64,
    /// Version of the program that made it.
    pub program_version: String,
    /// What the stage reported.
    pub report: StageReport,
}

/// A sealed artifact.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Artifact {
    /// Its directory.
    pub dir: PathBuf,
    /// Its seal.
    pub manifest: Manifest,
}

impl Artifact {
    /// A file of the artifact.
    pub fn path(&self, name: impl AsRef<Path>) -> PathBuf {
        self.dir.join(name)
    }

    /// A logical digest by one of the names in [`crate::outputs`].
    pub fn output(&self, name: &str) -> Option<&str> {
        self.manifest.outputs.get(name).map(String::as_str)
    }

    /// Opens a sealed directory. `Ok(None)` without a seal, `Err` with what is wrong when the seal cannot be believed.
    pub(crate) fn open(dir: &Path, stage: Stage) -> Result<Option<Self>, String> {
        let path = dir.join(MANIFEST_FILE);
        let bytes = match fs_err::read(&path) {
            Ok(bytes) => bytes,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(error.to_string()),
        };
        let manifest: Manifest = serde_json::from_slice(&bytes)
            .map_err(|error| format!("{MANIFEST_FILE} cannot be read: {error}"))?;
        if manifest.manifest_version != MANIFEST_VERSION {
            return Err(format!(
                "{MANIFEST_FILE} has version {}, expected {MANIFEST_VERSION}",
                manifest.manifest_version
            ));
        }
        if manifest.stage != stage || manifest.fingerprint != Fingerprint::of(&manifest.components)
        {
            return Err(format!("{MANIFEST_FILE} does not fit its content"));
        }
        for (name, size_bytes) in &manifest.files {
            match fs_err::metadata(dir.join(name)) {
                Ok(metadata) if metadata.len() == *size_bytes => {}
                Ok(metadata) => {
                    return Err(format!(
                        "{name} has {} bytes, sealed were {size_bytes}",
                        metadata.len()
                    ));
                }
                Err(_) => return Err(format!("{name} is gone")),
            }
        }
        let mut artifact = Self {
            dir: dir.to_owned(),
            manifest,
        };
        // The directory may have moved since.
        artifact.manifest.report.dir = dir.to_owned();
        Ok(Some(artifact))
    }

    /// Names and digests of the source files that `ingest` read; empty for other stages.
    pub(crate) fn sources(&self) -> BTreeMap<String, String> {
        fs_err::read(self.dir.join(SOURCES_FILE))
            .ok()
            .and_then(|bytes| serde_json::from_slice(&bytes).ok())
            .unwrap_or_default()
    }
}

impl Manifest {
    /// The seal of a finished run; the files are those that `dir` holds now.
    pub(crate) fn new(
        recipe_name: &str,
        components: BTreeMap<String, String>,
        report: StageReport,
        dir: &Path,
    ) -> io::Result<Self> {
        Ok(Self {
            manifest_version: MANIFEST_VERSION,
            stage: report.stage,
            recipe_name: recipe_name.to_owned(),
            fingerprint: Fingerprint::of(&components),
            components,
            outputs: report.outputs.clone(),
            files: sealed_files(dir)?,
            created: crate::clock::utc_timestamp(),
            created_unix_ms: u64::try_from(crate::clock::since_epoch().as_millis())
                .unwrap_or(u64::MAX),
            program_version: env!("CARGO_PKG_VERSION").to_owned(),
            report,
        })
    }
}

fn sealed_files(dir: &Path) -> io::Result<BTreeMap<String, u64>> {
    let mut found = BTreeMap::new();
    let entries = walkdir::WalkDir::new(dir)
        .into_iter()
        .filter_entry(|entry| {
            let name = entry.file_name().to_string_lossy();
            entry.depth() == 0 || (name != files::CHECKPOINTS && !name.starts_with('.'))
        });
    for entry in entries {
        let entry = entry?;
        if !entry.file_type().is_file() || entry.file_name() == MANIFEST_FILE {
            continue;
        }
        let name = entry
            .path()
            .strip_prefix(dir)
            .expect("the walk stays below its root")
            .to_string_lossy()
            .replace(std::path::MAIN_SEPARATOR, "/");
        found.insert(name, entry.metadata()?.len());
    }
    Ok(found)
}

/// Sealed artifacts of a stage, newest first. Directories without a believable seal are passed over.
pub fn earlier_artifacts(stage: Stage, runs: &Path) -> Vec<Artifact> {
    let Ok(entries) = fs_err::read_dir(runs.join(stage.name())) else {
        return Vec::new();
    };
    let mut found: Vec<Artifact> = entries
        .filter_map(Result::ok)
        .filter(|entry| !entry.file_name().to_string_lossy().starts_with('.'))
        .filter_map(|entry| match Artifact::open(&entry.path(), stage) {
            Ok(artifact) => artifact,
            Err(problem) => {
                tracing::warn!(dir = %entry.path().display(), problem, "artifact passed over");
                None
            }
        })
        .collect();
    found.sort_by(|a, b| {
        let age = |artifact: &Artifact| (artifact.manifest.created_unix_ms, artifact.dir.clone());
        age(b).cmp(&age(a))
    });
    found
}

/// Writes JSON so that the file is either the old one or the whole new one, also after a power cut.
pub(crate) fn write_json_atomically(path: &Path, value: &impl Serialize) -> io::Result<()> {
    let parent = path
        .parent()
        .ok_or_else(|| io::Error::other("no parent directory"))?;
    fs_err::create_dir_all(parent)?;
    let mut file = tempfile::Builder::new()
        .prefix(".tmp")
        .tempfile_in(parent)?;
    serde_json::to_writer_pretty(&mut file, value)?;
    file.write_all(b"\n")?;
    file.as_file().sync_all()?;
    #[cfg(unix)]
    {
        use std::os::unix::fs::PermissionsExt;
        // Temporary files are private; what is sealed is as readable as other files.
        file.as_file()
            .set_permissions(std::fs::Permissions::from_mode(0o644))?;
    }
    file.persist(path).map_err(|error| error.error)?;
    sync_directory(parent)
}

/// Makes renames in a directory last.
pub(crate) fn sync_directory(dir: &Path) -> io::Result<()> {
    if cfg!(unix) {
        fs_err::File::open(dir)?.sync_all()?;
    }
    Ok(())
}
