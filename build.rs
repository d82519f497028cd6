//! Finds the commit of the build. With the feature `cuda`, compiles our kernels for every supported GPU, and the code
//! that finds the driver when the program starts.

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
    use std::process::{Command, Stdio};

    const KERNELS: [&str; 9] = [
        "embed",
        "norm",
        "norm_rope",
        "attention",
        "geglu",
        "low_rank",
        "fp8",
        "training",
        "loss",
    ];

    /// The architectures for which machine code is made. Code for one also runs on later GPUs with the same major
    /// number. A compiler may not know all of them yet, or any more.
    const MACHINE_CODE: [u32; 6] = [80, 86, 89, 90, 100, 120];

    /// Ampere, the oldest architecture with bf16 tensor cores. The driver compiles the PTX for it on GPUs for which
    /// there is no machine code.
    const PTX: u32 = 80;

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

    /// Compiles each source to one fat binary, from which the driver takes the code for the installed GPU.
    fn kernels() {
        let out = PathBuf::from(std::env::var_os("OUT_DIR").expect("cargo sets OUT_DIR for build scripts"));
        let known = run(Command::new(nvcc()).arg("--list-gpu-code"));
        let is_known = |architecture: &u32| {
            known
                .split_whitespace()
                .any(|code| code == format!("sm_{architecture}"))
        };
        let mut targets = vec![format!("arch=compute_{PTX},code=compute_{PTX}")];
        for architecture in MACHINE_CODE.iter().filter(|architecture| is_known(architecture)) {
            targets.push(format!("arch=compute_{architecture},code=sm_{architecture}"));
        }
        // One process for each target, up to as many as cargo runs.
        let threads = std::env::var("NUM_JOBS").unwrap_or_else(|_| "1".to_owned());
        for kernel in KERNELS {
            let mut command = Command::new(nvcc());
            command.args(["-fatbin", "-std=c++17", "-O3", "--threads", &threads]);
            command.args(targets.iter().flat_map(|target| ["-gencode", target]));
            command.arg("-o").arg(out.join(format!("{kernel}.fatbin")));
            run(command.arg(Path::new("src/model/kernels/cuda").join(format!("{kernel}.cu"))));
        }
    }

    /// Runs a command and returns what it prints.
    fn run(command: &mut Command) -> String {
        match command.stderr(Stdio::inherit()).output() {
            Ok(output) if output.status.success() => String::from_utf8_lossy(&output.stdout).into_owned(),
            Ok(output) => panic!("{command:?} failed: {}", output.status),
            Err(error) => panic!("cannot run {command:?}: {error}; see README.md for how to install nvcc"),
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
