//! Our kernels: compiled by NVRTC when first used, kept on disk, launched with arguments packed by [`Args`].
//!
//! A compiled kernel's file name is the BLAKE3 of everything that it depends on: source, shared header, options,
//! architecture and compiler version. The file ends with the BLAKE3 of what is before: one that was damaged is compiled
//! again. A cache that cannot be written costs time and nothing else.

use std::cell::RefCell;
use std::collections::HashMap;
use std::ffi::{CString, c_char, c_void};
use std::hash::{DefaultHasher, Hasher as _};
use std::path::{Path, PathBuf};

use cudarc::driver::result::{self as driver, DriverError};
use cudarc::driver::sys;
use cudarc::nvrtc::result as nvrtc;
use cudarc::nvrtc::sys as nvrtc_sys;

use crate::error::CudaError;
use crate::stream::failed;
use crate::view::View;

/// The header that every kernel file includes.
const COMMON: &str = include_str!("../kernels/common.cuh");

/// Dynamic shared memory that a kernel gets without asking.
const DEFAULT_SHARED_BYTES: u32 = 48 << 10;

/// One file of kernels.
#[derive(Debug)]
pub struct Module {
    /// Its name without ending.
    pub name: &'static str,
    /// Its text.
    pub source: &'static str,
}

/// Grid and block of a launch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Launch {
    /// Blocks.
    pub grid: [u32; 3],
    /// Threads of a block.
    pub block: [u32; 3],
    /// Dynamic shared memory.
    pub shared_bytes: u32,
}

impl Launch {
    /// One thread for each of `n`, in blocks of `block`.
    pub fn linear(n: usize, block: u32) -> Self {
        let blocks = n.div_ceil(block as usize).max(1);
        Self {
            grid: [blocks.try_into().expect("fewer than 2^32 blocks"), 1, 1],
            block: [block, 1, 1],
            shared_bytes: 0,
        }
    }
}

/// The arguments of a launch, in the kernel's order.
#[derive(Debug, Default)]
pub struct Args {
    words: Vec<u64>,
    /// Where each argument starts in `words`.
    starts: Vec<usize>,
    view_bytes: usize,
}

impl Args {
    /// No arguments yet.
    pub fn new() -> Self {
        Self::default()
    }

    fn word(mut self, word: u64) -> Self {
        self.starts.push(self.words.len());
        self.words.push(word);
        self
    }

    /// A pointer.
    pub fn ptr(mut self, view: View) -> Self {
        self.view_bytes += view.bytes();
        self.word(view.address())
    }

    /// A pointer or null.
    pub fn opt(self, view: Option<View>) -> Self {
        match view {
            Some(view) => self.ptr(view),
            None => self.word(0),
        }
    }

    /// An `int`.
    ///
    /// # Panics
    ///
    /// If the number does not fit.
    pub fn i32(self, value: impl TryInto<i32>) -> Self {
        let value: i32 = value.try_into().ok().expect("sizes are below 2^31");
        self.word(u64::from(value as u32))
    }

    /// A `long long`.
    pub fn i64(self, value: i64) -> Self {
        self.word(value as u64)
    }

    /// An `unsigned int`.
    pub fn u32(self, value: u32) -> Self {
        self.word(u64::from(value))
    }

    /// An `unsigned long long`.
    pub fn u64(self, value: u64) -> Self {
        self.word(value)
    }

    /// A `float`.
    pub fn f32(self, value: f32) -> Self {
        self.word(u64::from(value.to_bits()))
    }

    /// A structure of 128 bytes by value (a tensor map).
    pub fn blob(mut self, bytes: &[u8; 128]) -> Self {
        self.starts.push(self.words.len());
        let words = bytes
            .chunks_exact(8)
            .map(|word| u64::from_ne_bytes(word.try_into().expect("eight bytes")));
        self.words.extend(words);
        self
    }

    #[cfg(test)]
    pub(crate) fn words(&self) -> &[u64] {
        &self.words
    }

    pub(crate) fn view_bytes(&self) -> usize {
        self.view_bytes
    }

    /// # Safety
    ///
    /// The arguments are those of `function`, and its memory is alive.
    pub(crate) unsafe fn launch(
        mut self,
        function: sys::CUfunction,
        launch: Launch,
        stream: sys::CUstream,
    ) -> Result<(), DriverError> {
        let words = self.words.as_mut_ptr();
        let mut pointers: Vec<*mut c_void> = self
            .starts
            .iter()
            // SAFETY: every start is an index into `words`.
            .map(|start| unsafe { words.add(*start) }.cast())
            .collect();
        let [grid, block] = [launch.grid, launch.block].map(|[x, y, z]| (x, y, z));
        // SAFETY: the driver copies the arguments before it returns; the rest is the caller's promise.
        unsafe {
            driver::launch_kernel(
                function,
                grid,
                block,
                launch.shared_bytes,
                stream,
                &mut pointers,
            )
        }
    }
}

/// A function of a loaded module, and how much dynamic shared memory it may have.
struct Function {
    handle: sys::CUfunction,
    shared_bytes: u32,
}

/// Everything loaded so far. Modules stay loaded as long as the context.
pub(crate) struct Kernels {
    architecture: String,
    cache: Option<PathBuf>,
    modules: RefCell<HashMap<u64, sys::CUmodule>>,
    functions: RefCell<HashMap<u64, Function>>,
}

fn key(parts: impl std::hash::Hash) -> u64 {
    let mut hasher = DefaultHasher::new();
    parts.hash(&mut hasher);
    hasher.finish()
}

impl Kernels {
    pub(crate) fn new((major, minor): (u32, u32), cache: Option<PathBuf>) -> Self {
        // Only `sm_90a` has wgmma.
        let suffix = if (major, minor) == (9, 0) { "a" } else { "" };
        Self {
            architecture: format!("sm_{major}{minor}{suffix}"),
            cache: cache.or_else(user_cache),
            modules: RefCell::default(),
            functions: RefCell::default(),
        }
    }

    /// The kernel `name` of a file compiled with `defines`, ready for the launch.
    pub(crate) fn function(
        &self,
        module: &'static Module,
        defines: &[&str],
        name: &str,
        launch: Launch,
    ) -> Result<sys::CUfunction, CudaError> {
        let module_key = key((module.name, defines));
        let function_key = key((module_key, name));
        let mut functions = self.functions.borrow_mut();
        let function = match functions.entry(function_key) {
            std::collections::hash_map::Entry::Occupied(entry) => entry.into_mut(),
            std::collections::hash_map::Entry::Vacant(entry) => {
                let loaded = self.load(module_key, module, defines)?;
                let c_name = CString::new(name).expect("kernels' names have no zeros");
                // SAFETY: the module was loaded and is never unloaded.
                let handle = unsafe { driver::module::get_function(loaded, c_name) }
                    .map_err(failed(name))?;
                entry.insert(Function {
                    handle,
                    shared_bytes: DEFAULT_SHARED_BYTES,
                })
            }
        };
        if launch.shared_bytes > function.shared_bytes {
            let attribute =
                sys::CUfunction_attribute_enum::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
            // SAFETY: the function is loaded.
            unsafe {
                driver::function::set_function_attribute(
                    function.handle,
                    attribute,
                    launch.shared_bytes as i32,
                )
            }
            .map_err(failed(name))?;
            function.shared_bytes = launch.shared_bytes;
        }
        Ok(function.handle)
    }

    fn load(
        &self,
        module_key: u64,
        module: &'static Module,
        defines: &[&str],
    ) -> Result<sys::CUmodule, CudaError> {
        if let Some(loaded) = self.modules.borrow().get(&module_key) {
            return Ok(*loaded);
        }
        let binary = self.binary(module, defines)?;
        // SAFETY: the bytes are a whole compiled module, as its digest says if it comes from disk; the driver copies them.
        let loaded = unsafe { driver::module::load_data(binary.as_ptr().cast()) }
            .map_err(failed(&format!("loading of kernels/{}.cu", module.name)))?;
        self.modules.borrow_mut().insert(module_key, loaded);
        Ok(loaded)
    }

    /// What NVRTC is told.
    fn options(&self, defines: &[&str]) -> Vec<String> {
        let architecture = format!("--gpu-architecture={}", self.architecture);
        let fixed = [
            "-std=c++17",
            "-default-device",
            "-lineinfo",
            // NVRTC's defaults, which no wrapper or later version may change: the kernels of NF4 and of the optimisers equal
            // bitsandbytes and PyTorch to the bit, small numbers, quotients and roots included.
            "--ftz=false",
            "--prec-div=true",
            "--prec-sqrt=true",
        ];
        let options = std::iter::once(architecture.as_str());
        let options = options.chain(fixed).chain(defines.iter().copied());
        options.map(str::to_owned).collect()
    }

    /// The compiled module, from disk or from NVRTC.
    fn binary(&self, module: &'static Module, defines: &[&str]) -> Result<Vec<u8>, CudaError> {
        let options = self.options(defines);
        let path = self
            .cache
            .as_ref()
            .map(|folder| folder.join(file_name(module, &options, compiler_version())));
        if let Some(path) = &path
            && let Ok(bytes) = fs_err::read(path)
        {
            match without_digest(bytes) {
                Some(binary) => return Ok(binary),
                None => {
                    tracing::warn!(path = %path.display(), "a damaged file of compiled kernels is made anew")
                }
            }
        }
        tracing::info!(module = module.name, ?defines, "compiling kernels");
        let binary = compile(module, &options)?;
        if let Some(path) = &path
            && let Err(error) = keep(path, &binary)
        {
            tracing::warn!(%error, path = %path.display(), "compiled kernels are not kept");
        }
        Ok(binary)
    }
}

fn keep(path: &Path, binary: &[u8]) -> Result<(), artifacts::ArtifactError> {
    if let Some(folder) = path.parent()
        && let Err(error) = fs_err::create_dir_all(folder)
    {
        tracing::debug!(%error, "cannot make the folder of compiled kernels");
    }
    artifacts::write_atomically(path, |file| {
        use std::io::Write as _;
        file.write_all(binary)?;
        file.write_all(blake3::hash(binary).as_bytes())
    })
}

/// What [`keep`] was given, if the file is whole.
fn without_digest(mut bytes: Vec<u8>) -> Option<Vec<u8>> {
    let len = bytes.len().checked_sub(blake3::OUT_LEN)?;
    let is_whole = len > 0 && *blake3::hash(&bytes[..len]).as_bytes() == bytes[len..];
    bytes.truncate(len);
    is_whole.then_some(bytes)
}

/// `$XDG_CACHE_HOME/spritelora/kernels`, or the same below `~/.cache`.
fn user_cache() -> Option<PathBuf> {
    let root = std::env::var_os("XDG_CACHE_HOME")
        .map(PathBuf::from)
        .or_else(|| std::env::var_os("HOME").map(|home| PathBuf::from(home).join(".cache")))?;
    Some(root.join("spritelora").join("kernels"))
}

fn file_name(module: &Module, options: &[String], compiler: (i32, i32)) -> String {
    let mut hasher = blake3::Hasher::new();
    for part in [COMMON, module.source]
        .into_iter()
        .chain(options.iter().map(String::as_str))
    {
        hasher.update(&(part.len() as u64).to_le_bytes());
        hasher.update(part.as_bytes());
    }
    hasher.update(&compiler.0.to_le_bytes());
    hasher.update(&compiler.1.to_le_bytes());
    let digest = hasher.finalize().to_hex();
    format!("{}-{}.cubin", module.name, &digest[..32])
}

/// NVRTC's version, major and minor.
pub(crate) fn compiler_version() -> (i32, i32) {
    let (mut major, mut minor) = (0, 0);
    // SAFETY: the pointers are to local numbers. A version that cannot be asked for counts as 0.
    let _ = unsafe { nvrtc_sys::nvrtcVersion(&mut major, &mut minor) };
    (major, minor)
}

fn compile(module: &'static Module, options: &[String]) -> Result<Vec<u8>, CudaError> {
    let text = |s: &str| CString::new(s).expect("sources have no zeros");
    let (source, name) = (text(module.source), text(&format!("{}.cu", module.name)));
    let (header, header_name) = (text(COMMON), text("common.cuh"));
    let (headers, header_names) = ([header.as_ptr()], [header_name.as_ptr()]);
    let refused = |log: String| CudaError::Compile {
        module: module.name,
        options: options.to_vec(),
        log,
    };
    let mut program = std::ptr::null_mut();
    // SAFETY: all strings outlive the program, which is destroyed below.
    unsafe {
        nvrtc_sys::nvrtcCreateProgram(
            &mut program,
            source.as_ptr(),
            name.as_ptr(),
            1,
            headers.as_ptr(),
            header_names.as_ptr(),
        )
    }
    .result()
    .map_err(|error| refused(format!("{:?}", error.0)))?;
    // SAFETY: the program was made above and is alive.
    let outcome = unsafe {
        match nvrtc::compile_program(program, options) {
            Err(error) => {
                let log = nvrtc::get_program_log(program)
                    .map(|log| log.iter().map(|c: &c_char| *c as u8 as char).collect())
                    .map(|log: String| log.trim_end_matches('\0').to_owned())
                    .unwrap_or_else(|_| format!("{:?}", error.0));
                Err(refused(log))
            }
            Ok(()) => cubin(program).map_err(|error| refused(format!("{:?}", error.0))),
        }
    };
    // SAFETY: destroyed once; nothing refers to it any more.
    let _ = unsafe { nvrtc::destroy_program(program) };
    outcome
}

/// # Safety
///
/// The program is alive and compiled.
unsafe fn cubin(program: nvrtc_sys::nvrtcProgram) -> Result<Vec<u8>, nvrtc::NvrtcError> {
    let mut size = 0;
    // SAFETY: the size is asked for first, and the buffer has it.
    unsafe {
        nvrtc_sys::nvrtcGetCUBINSize(program, &mut size).result()?;
        let mut binary = vec![0u8; size];
        nvrtc_sys::nvrtcGetCUBIN(program, binary.as_mut_ptr().cast()).result()?;
        Ok(binary)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MODULE: Module = Module {
        name: "m",
        source: "s",
    };

    #[test]
    fn a_compiled_kernels_name_depends_on_source_options_and_compiler() {
        let options = ["-DT_BF16".to_owned()];
        let names = [
            file_name(&MODULE, &options, (13, 0)),
            file_name(&MODULE, &["-DT_F16".to_owned()], (13, 0)),
            file_name(&MODULE, &options, (13, 1)),
            file_name(
                &Module {
                    source: "t",
                    ..MODULE
                },
                &options,
                (13, 0),
            ),
        ];
        let different: std::collections::BTreeSet<&String> = names.iter().collect();
        assert_eq!(different.len(), names.len());
        assert!(names[0].starts_with("m-") && names[0].ends_with(".cubin"));
    }

    #[test]
    fn only_a_whole_file_of_compiled_kernels_is_taken() {
        let folder = tempfile::tempdir().expect("a temporary directory");
        let path = folder.path().join("below/m.cubin");
        keep(&path, b"machine code").expect("it can be written");
        let bytes = fs_err::read(&path).expect("it was written");
        assert_eq!(
            without_digest(bytes.clone()).as_deref(),
            Some(&b"machine code"[..])
        );
        let mut other = bytes.clone();
        other[3] ^= 1;
        for damaged in [
            &bytes[..bytes.len() - 1],
            &bytes[..20],
            &[],
            &bytes[12..],
            &other,
        ] {
            assert_eq!(without_digest(damaged.to_vec()), None);
        }
    }

    #[test]
    fn arguments_start_where_the_kernel_expects_them() {
        let args = Args::new()
            .ptr(View::new(7, 10))
            .blob(&[1; 128])
            .opt(None)
            .f32(1.0);
        assert_eq!(args.starts, [0, 1, 17, 18]);
        assert_eq!(args.words[0], 7);
        assert_eq!(args.words[18], u64::from(1.0f32.to_bits()));
        assert_eq!(args.view_bytes(), 10);
    }

    #[test]
    fn small_numbers_quotients_and_roots_are_ieee_for_all_kernels() {
        let options = Kernels::new((8, 0), None).options(&["-DT_F16"]);
        for option in [
            "--ftz=false",
            "--prec-div=true",
            "--prec-sqrt=true",
            "-DT_F16",
        ] {
            assert!(options.iter().any(|given| given == option), "{options:?}");
        }
    }

    #[test]
    fn hopper_alone_gets_its_own_instructions() {
        assert_eq!(Kernels::new((9, 0), None).architecture, "sm_90a");
        assert_eq!(Kernels::new((8, 6), None).architecture, "sm_86");
    }
}
