//! `pageferry keys`: certificates for a lab, and what there is to know of those in a folder.

mod made;
mod shown;

use std::path::PathBuf;

use clap::{Args, Subcommand};

use super::{CliError, print};
use made::Made;
use shown::Shown;

/// Makes certificates for TLS, and shows them
#[derive(Debug, Args)]
#[command(
    after_help = "Examples:\n  pageferry keys init keys --host node1,node7,10.0.0.7\n  pageferry keys show keys"
)]
pub(super) struct KeysArgs {
    #[command(subcommand)]
    command: KeysCommand,
    /// Print one JSON object instead of text
    #[arg(long, global = true)]
    pub(super) json: bool,
}

#[derive(Debug, Subcommand)]
enum KeysCommand {
    /// Makes an authority, and a certificate and key that it signs for each side, in a new folder; refuses to overwrite anything
    #[command(after_help = "Examples:\n  pageferry keys init keys --host node1,node7,10.0.0.7\n  \
pageferry keys init keys-of-node8 --host node8 --ca keys\n\n\
The folder is for --tls-dir, here and in QEMU (-object tls-creds-x509,dir=DIR). Files of a CA that your site has serve as well.")]
    Init(InitArgs),
    /// Shows whom the certificates in a folder are for, and how long they are good; exit code 1 when one is not good any more
    #[command(after_help = "Example:\n  pageferry keys show keys --json")]
    Show {
        /// The folder, or a file
        path: PathBuf,
    },
}

#[derive(Debug, Args)]
struct InitArgs {
    /// The folder; made where there is none
    dir: PathBuf,
    /// Names and addresses of the hosts that the certificates are for, beside localhost and this host
    #[arg(long, value_name = "NAME,IP", value_delimiter = ',')]
    host: Vec<String>,
    /// Days from now on which they are good
    #[arg(long, value_name = "N", default_value_t = 365, value_parser = clap::value_parser!(u16).range(1..=3650))]
    days: u16,
    /// Let the authority in this folder sign, instead of a new one
    #[arg(long, value_name = "DIR")]
    ca: Option<PathBuf>,
}

pub(super) fn run(args: &KeysArgs) -> Result<std::process::ExitCode, CliError> {
    let good = match &args.command {
        KeysCommand::Init(init) => {
            let made = Made::make(init)?;
            if args.json {
                print::line(made.json());
            } else {
                print::text(made);
            }
            true
        }
        KeysCommand::Show { path } => {
            let shown = Shown::of(path)?;
            let good = shown.are_good();
            if args.json {
                print::line(shown.json());
            } else {
                print::text(shown);
            }
            good
        }
    };
    Ok(if good { std::process::ExitCode::SUCCESS } else { std::process::ExitCode::from(1) })
}
