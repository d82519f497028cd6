//! Finds the commit of the build. With the feature `cuda`, compiles our kernels to PTX, which the driver compiles
//! further for the GPU, and the code that finds the driver when the program starts.

fn main() {
    println!("cargo::rerun-if-changed=build.rs");
    commit::find();
    #[cfg(feature = "cuda")]
    cuda::build();
}

mod commit {
    use std::path::Path;
    use std::process::Command;

    /// The variable in which a packager who builds without a clone passes the commit, and in which the build receives
    /// it.
    const VARIABLE: &str = "MODERATORD_COMMIT";

    pub fn find() {
        println!("cargo::rerun-if-env-changed={VARIABLE}");
        let given = std::env::var(VARIABLE).ok().filter(|commit| !commit.is_empty());
        let commit = given.or_else(from_git).unwrap_or_else(|| "unknown".to_owned());
        println!("cargo::rustc-env={VARIABLE}={commit}");
    }

    fn from_git() -> Option<String> {
        // A source archive may have been unpacked inside the clone of another project.
        if !Path::new(".git").exists() {
            return None;
        }
        // Git appends to this log whenever another commit is checked out or made. Without the log, the commit is that of
        // the last time that this script ran.
        if let Some(log) = git(&["rev-parse", "--git-path", "logs/HEAD"]).filter(|log| Path::new(log).exists()) {
            println!("cargo::rerun-if-changed={log}");
        }
        git(&["rev-parse", "--short=12", "HEAD"])
    }

    fn git(args: &[&str]) -> Option<String> {
        let output = Command::new("git").args(args).output().ok()?;
        let text = String::from_utf8(output.stdout).ok()?;
        output.status.success().then(|| text.trim().to_owned())
    }
}

#[cfg(feature = "cuda")]
mod cuda {
    use std::path::{Path, PathBuf};
    use std::process::Command;

    const KERNELS: [&str; 4] = ["geglu", "norm", "norm_rope", "attention"];

    /// Ampere, the oldest architecture with bf16 tensor cores. Later ones run the same code.
    const ARCHITECTURE: &str = "compute_80";

    pub fn build() {
        println!("cargo::rerun-if-changed=src/model/kernels/cuda");
        println!("cargo::rerun-if-changed=src/model/device/driver.c");
        println!("cargo::rerun-if-env-changed=NVCC");
        println!("cargo::rerun-if-env-changed=CUDA_HOME");
        kernels();
        // The whole archive must come before the driver's library. Otherwise the linker takes that library's functions.
        cc::Build::new()
            .file("src/model/device/driver.c")
            .link_lib_modifier("+whole-archive")
            .compile("moderatord_driver");
    }

    fn kernels() {
        let out = PathBuf::from(std::env::var_os("OUT_DIR").expect("cargo sets OUT_DIR for build scripts"));
        for kernel in KERNELS {
            let source = Path::new("src/model/kernels/cuda").join(format!("{kernel}.cu"));
            let target = out.join(format!("{kernel}.ptx"));
            let mut command = Command::new(nvcc());
            command.args(["-ptx", "-std=c++17", "-O3", "-arch", ARCHITECTURE, "-o"]);
            let status = command.arg(&target).arg(&source).status();
            match status {
                Ok(status) if status.success() => {}
                Ok(status) => panic!("{command:?} failed: {status}"),
                Err(error) => panic!("cannot run {command:?}: {error}; see README.md for how to install nvcc"),
            }
        }
    }

    fn nvcc() -> PathBuf {
        let home = || std::env::var_os("CUDA_HOME").map(|home| Path::new(&home).join("bin/nvcc"));
        std::env::var_os("NVCC")
            .map(PathBuf::from)
            .or_else(home)
            .unwrap_or_else(|| "nvcc".into())
    }
}
