//! `moderatord fetch`: downloads a model or an adapter from the Hugging Face hub.

use std::io::Write;

use clap::Args;

use super::{Exit, named};
use crate::config::{LogConfig, LogFormat, LogLevel};
use crate::hub::Reference;
use crate::ops::log;

#[derive(Debug, Args)]
#[command(after_help = AFTER_HELP)]
pub(super) struct FetchArgs {
    /// Name of a model or a PEFT adapter: hf://OWNER/NAME, or hf://OWNER/NAME@REVISION
    #[arg(value_name = "NAME", value_parser = Reference::parse)]
    name: Reference,
}

const AFTER_HELP: &str = "\
Downloads the config, the tokenizer and the weights into the cache that Python's huggingface_hub also
uses, checks the SHA-256 of the weights, and prints the folder. Interrupted downloads are resumed.
`model.path` and `model.adapter` accept the same names.

Environment:
  HF_TOKEN, HF_TOKEN_PATH  token for gated and private repositories, or the file with the token;
                           default: the file `token` in HF_HOME
  HF_HOME, HF_HUB_CACHE    where the cache is; default: ~/.cache/huggingface/hub
  HF_ENDPOINT              address of a mirror of the hub

Exit codes:
  0   the model is in the cache
  1   the hub, the network or the disk failed; another attempt resumes the download
  78  the hub refuses: the name, the licence or the token needs attention

Examples:
  moderatord fetch hf://google/gemma-3-270m-it
  HF_TOKEN_PATH=/etc/moderatord/hf-token moderatord fetch hf://google/shieldgemma-2b@main";

pub(super) fn run(args: &FetchArgs, out: &mut dyn Write) -> anyhow::Result<Exit> {
    log::start_for_command(&LogConfig {
        format: LogFormat::Human,
        level: LogLevel::Info,
    });
    let snapshot = named::fetch(&args.name)?;
    writeln!(out, "commit    {}", snapshot.commit)?;
    writeln!(out, "folder    {}", snapshot.folder.display())?;
    Ok(Exit::Success)
}
