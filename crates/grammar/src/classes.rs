//! What each node of the tree means.

use std::collections::BTreeSet;

use model::policy::{Class, Command};

use crate::tree::{Tree, Value};

/// Statements that are what they are, whatever stands in them: the node, the manual's name, the class. A node that is
/// neither here nor in [`command`] is unknown.
const PLAIN: &[(&str, &str, Class)] = &[
    ("AlterCollationStmt", "ALTER COLLATION", Class::Definition),
    ("AlterDatabaseRefreshCollStmt", "ALTER DATABASE", Class::Definition),
    ("AlterDatabaseSetStmt", "ALTER DATABASE", Class::Definition),
    ("AlterDatabaseStmt", "ALTER DATABASE", Class::Definition),
    ("AlterDefaultPrivilegesStmt", "ALTER DEFAULT PRIVILEGES", Class::Definition),
    ("AlterDomainStmt", "ALTER DOMAIN", Class::Definition),
    ("AlterEnumStmt", "ALTER TYPE", Class::Definition),
    ("AlterEventTrigStmt", "ALTER EVENT TRIGGER", Class::Definition),
    ("AlterExtensionContentsStmt", "ALTER EXTENSION", Class::Definition),
    ("AlterExtensionStmt", "ALTER EXTENSION", Class::Definition),
    ("AlterFdwStmt", "ALTER FOREIGN DATA WRAPPER", Class::Definition),
    ("AlterForeignServerStmt", "ALTER SERVER", Class::Definition),
    ("AlterFunctionStmt", "ALTER FUNCTION", Class::Definition),
    ("AlterObjectDependsStmt", "ALTER", Class::Definition),
    ("AlterObjectSchemaStmt", "ALTER", Class::Definition),
    ("AlterOpFamilyStmt", "ALTER OPERATOR FAMILY", Class::Definition),
    ("AlterOperatorStmt", "ALTER OPERATOR", Class::Definition),
    ("AlterOwnerStmt", "ALTER", Class::Definition),
    ("AlterPolicyStmt", "ALTER POLICY", Class::Definition),
    ("AlterPublicationStmt", "ALTER PUBLICATION", Class::Definition),
    ("AlterRoleSetStmt", "ALTER ROLE", Class::Definition),
    ("AlterRoleStmt", "ALTER ROLE", Class::Definition),
    ("AlterSeqStmt", "ALTER SEQUENCE", Class::Definition),
    ("AlterStatsStmt", "ALTER STATISTICS", Class::Definition),
    ("AlterSubscriptionStmt", "ALTER SUBSCRIPTION", Class::Definition),
    ("AlterSystemStmt", "ALTER SYSTEM", Class::Server),
    ("AlterTSConfigurationStmt", "ALTER TEXT SEARCH CONFIGURATION", Class::Definition),
    ("AlterTSDictionaryStmt", "ALTER TEXT SEARCH DICTIONARY", Class::Definition),
    ("AlterTableMoveAllStmt", "ALTER TABLE", Class::Definition),
    ("AlterTableSpaceOptionsStmt", "ALTER TABLESPACE", Class::Definition),
    ("AlterTableStmt", "ALTER TABLE", Class::Definition),
    ("AlterTypeStmt", "ALTER TYPE", Class::Definition),
    ("AlterUserMappingStmt", "ALTER USER MAPPING", Class::Definition),
    ("CallStmt", "CALL", Class::Code),
    ("CheckPointStmt", "CHECKPOINT", Class::Maintenance),
    ("ClosePortalStmt", "CLOSE", Class::Session),
    ("ClusterStmt", "CLUSTER", Class::Maintenance),
    ("CommentStmt", "COMMENT", Class::Definition),
    ("CompositeTypeStmt", "CREATE TYPE", Class::Definition),
    ("ConstraintsSetStmt", "SET CONSTRAINTS", Class::Session),
    ("CreateAmStmt", "CREATE ACCESS METHOD", Class::Definition),
    ("CreateCastStmt", "CREATE CAST", Class::Definition),
    ("CreateConversionStmt", "CREATE CONVERSION", Class::Definition),
    ("CreateDomainStmt", "CREATE DOMAIN", Class::Definition),
    ("CreateEnumStmt", "CREATE TYPE", Class::Definition),
    ("CreateEventTrigStmt", "CREATE EVENT TRIGGER", Class::Definition),
    ("CreateExtensionStmt", "CREATE EXTENSION", Class::Definition),
    ("CreateFdwStmt", "CREATE FOREIGN DATA WRAPPER", Class::Definition),
    ("CreateForeignServerStmt", "CREATE SERVER", Class::Definition),
    ("CreateForeignTableStmt", "CREATE FOREIGN TABLE", Class::Definition),
    ("CreateFunctionStmt", "CREATE FUNCTION", Class::Definition),
    ("CreateOpClassStmt", "CREATE OPERATOR CLASS", Class::Definition),
    ("CreateOpFamilyStmt", "CREATE OPERATOR FAMILY", Class::Definition),
    ("CreatePLangStmt", "CREATE LANGUAGE", Class::Definition),
    ("CreatePolicyStmt", "CREATE POLICY", Class::Definition),
    ("CreatePublicationStmt", "CREATE PUBLICATION", Class::Definition),
    ("CreateRangeStmt", "CREATE TYPE", Class::Definition),
    ("CreateRoleStmt", "CREATE ROLE", Class::Definition),
    ("CreateSchemaStmt", "CREATE SCHEMA", Class::Definition),
    ("CreateSeqStmt", "CREATE SEQUENCE", Class::Definition),
    ("CreateStatsStmt", "CREATE STATISTICS", Class::Definition),
    ("CreateStmt", "CREATE TABLE", Class::Definition),
    ("CreateSubscriptionStmt", "CREATE SUBSCRIPTION", Class::Definition),
    ("CreateTableSpaceStmt", "CREATE TABLESPACE", Class::Definition),
    ("CreateTransformStmt", "CREATE TRANSFORM", Class::Definition),
    ("CreateTrigStmt", "CREATE TRIGGER", Class::Definition),
    ("CreateUserMappingStmt", "CREATE USER MAPPING", Class::Definition),
    ("CreatedbStmt", "CREATE DATABASE", Class::Definition),
    ("DeallocateStmt", "DEALLOCATE", Class::Session),
    ("DefineStmt", "CREATE", Class::Definition),
    ("DeleteStmt", "DELETE", Class::Write),
    ("DiscardStmt", "DISCARD", Class::Session),
    ("DoStmt", "DO", Class::Code),
    ("DropOwnedStmt", "DROP OWNED", Class::Definition),
    ("DropRoleStmt", "DROP ROLE", Class::Definition),
    ("DropStmt", "DROP", Class::Definition),
    ("DropSubscriptionStmt", "DROP SUBSCRIPTION", Class::Definition),
    ("DropTableSpaceStmt", "DROP TABLESPACE", Class::Definition),
    ("DropUserMappingStmt", "DROP USER MAPPING", Class::Definition),
    ("DropdbStmt", "DROP DATABASE", Class::Definition),
    ("GrantRoleStmt", "GRANT", Class::Definition),
    ("GrantStmt", "GRANT", Class::Definition),
    ("ImportForeignSchemaStmt", "IMPORT FOREIGN SCHEMA", Class::Definition),
    ("IndexStmt", "CREATE INDEX", Class::Definition),
    ("InsertStmt", "INSERT", Class::Write),
    ("ListenStmt", "LISTEN", Class::Session),
    ("LoadStmt", "LOAD", Class::Server),
    ("LockStmt", "LOCK", Class::Lock),
    ("MergeStmt", "MERGE", Class::Write),
    ("NotifyStmt", "NOTIFY", Class::Notify),
    ("ReassignOwnedStmt", "REASSIGN OWNED", Class::Definition),
    ("RefreshMatViewStmt", "REFRESH MATERIALIZED VIEW", Class::Write),
    ("ReindexStmt", "REINDEX", Class::Maintenance),
    ("RenameStmt", "ALTER", Class::Definition),
    ("RuleStmt", "CREATE RULE", Class::Definition),
    ("SecLabelStmt", "SECURITY LABEL", Class::Definition),
    ("TruncateStmt", "TRUNCATE", Class::Write),
    ("UnlistenStmt", "UNLISTEN", Class::Session),
    ("UpdateStmt", "UPDATE", Class::Write),
    ("VariableShowStmt", "SHOW", Class::Read),
    ("ViewStmt", "CREATE VIEW", Class::Definition),
];

/// What has a syntax of its own since 16 or 17 (`gram.y`, "func_expr_common_subexpr"): the node, and a name by which an earlier
/// server looks for a function.
const SYNTAX: &[(&str, &str)] = &[
    ("JsonArrayAgg", "json_arrayagg"),
    ("JsonArrayConstructor", "json_array"),
    ("JsonArrayQueryConstructor", "json_array"),
    ("JsonFuncExpr", "json_exists"),
    ("JsonFuncExpr", "json_query"),
    ("JsonFuncExpr", "json_value"),
    ("JsonObjectAgg", "json_objectagg"),
    ("JsonObjectConstructor", "json_object"),
    ("JsonParseExpr", "json"),
    ("JsonScalarExpr", "json_scalar"),
    ("JsonSerializeExpr", "json_serialize"),
    ("JsonTable", "json_table"),
    ("MergeSupportFunc", "merge_action"),
];

/// Operators that are written as words (`transformAExprBetween`).
const BETWEEN: [(&str, [&str; 2]); 4] = [
    ("BETWEEN", [">=", "<="]),
    ("BETWEEN SYMMETRIC", [">=", "<="]),
    ("NOT BETWEEN", ["<", ">"]),
    ("NOT BETWEEN SYMMETRIC", ["<", ">"]),
];

/// Settings that give leave to write.
const READ_ONLY: [&str; 2] = ["transaction_read_only", "default_transaction_read_only"];

/// The commands of a tree. None if it is not shaped as the grammar's trees are.
pub(crate) fn commands(tree: &Tree<'_>) -> Option<Vec<Command>> {
    // A text of nothing has none.
    let Some((statements, _)) = tree.field(0, "stmts") else { return Some(Vec::new()) };
    let mut commands = Vec::new();
    let statements: Vec<usize> = tree.children(statements).map(|(at, _)| at).collect();
    for statement in statements {
        let (node, _) = tree.field(statement, "stmt")?;
        let (at, entry) = tree.children(node).next()?;
        commands.push(command(tree, at, entry.key));
    }
    Some(commands)
}

fn command(tree: &Tree<'_>, at: usize, kind: &str) -> Command {
    let mut command = match kind {
        "SelectStmt" => all_of("SELECT", &select(tree, at)),
        "CopyStmt" => copy(tree, at),
        "ExplainStmt" => explain(tree, at),
        "DeclareCursorStmt" => all_of("DECLARE", &inner_classes(tree, at)),
        "CreateTableAsStmt" => {
            let mut command = Command::new("CREATE TABLE AS", Class::Definition);
            command.also = inner_classes(tree, at);
            command.also.remove(&Class::Read);
            // It may be EXECUTE of one.
            command.prepared = inner(tree, at).and_then(|inner| inner.prepared);
            command
        }
        "PrepareStmt" => {
            let mut command = Command::new("PREPARE", Class::Session);
            command.prepared = tree.text(at, "name").map(unescaped);
            command.prepares = Some(inner_classes(tree, at));
            command
        }
        "ExecuteStmt" => {
            let mut command = Command::new("EXECUTE", Class::Execute);
            command.prepared = tree.text(at, "name").map(unescaped);
            command
        }
        "FetchStmt" => {
            let mut command = Command::new("FETCH", Class::Read);
            command.cursor = tree.text(at, "portalname").map(unescaped);
            command
        }
        "TransactionStmt" => transaction(tree, at),
        "VariableSetStmt" => variable(tree, at),
        "VacuumStmt" => {
            let name = if tree.field(at, "is_vacuumcmd").is_some() { "VACUUM" } else { "ANALYZE" };
            Command::new(name, Class::Maintenance)
        }
        _ => match PLAIN.iter().find(|(node, ..)| *node == kind) {
            Some((_, name, class)) => Command::new(name, *class),
            None => Command::new("unknown", Class::Unknown),
        },
    };
    names(tree, at, &mut command);
    command
}

/// A statement within a statement, in its field `query`.
fn inner(tree: &Tree<'_>, at: usize) -> Option<Command> {
    let (query, _) = tree.field(at, "query")?;
    let (at, entry) = tree.children(query).next()?;
    // One level: none of those that hold a statement can stand in another but EXPLAIN of them.
    Some(match entry.key {
        "ExplainStmt" | "PrepareStmt" => Command::new("unknown", Class::Unknown),
        kind => command(tree, at, kind),
    })
}

fn inner_classes(tree: &Tree<'_>, at: usize) -> BTreeSet<Class> {
    inner(tree, at).map_or(BTreeSet::from([Class::Unknown]), |inner| inner.own_classes())
}

/// A command that does all this, which is not nothing.
fn all_of(name: &'static str, classes: &BTreeSet<Class>) -> Command {
    let mut also = classes.clone();
    let mut command = Command::new(name, also.pop_last().unwrap_or(Class::Unknown));
    // Whatever else is done is read as well.
    also.remove(&Class::Read);
    command.also = also;
    command
}

/// What a SELECT does. Statements in WITH are in it as well.
fn select(tree: &Tree<'_>, at: usize) -> BTreeSet<Class> {
    let found = tree.within(at).filter_map(|(_, entry)| match entry.key {
        "intoClause" => Some(Class::Definition),
        "InsertStmt" | "UpdateStmt" | "DeleteStmt" | "MergeStmt" => Some(Class::Write),
        "LockingClause" => Some(Class::RowLock),
        _ => None,
    });
    found.chain([Class::Read]).collect()
}

fn copy(tree: &Tree<'_>, at: usize) -> Command {
    let of_rows = match tree.field(at, "is_from") {
        Some(_) => BTreeSet::from([Class::Write]),
        None => BTreeSet::from([Class::Read]),
    };
    let mut classes = inner(tree, at).map_or(of_rows, |inner| inner.own_classes());
    if tree.field(at, "filename").is_some() || tree.field(at, "is_program").is_some() {
        classes.insert(Class::Server);
    }
    all_of("COPY", &classes)
}

/// Without ANALYZE nothing is run.
fn explain(tree: &Tree<'_>, at: usize) -> Command {
    let options = tree.field(at, "options");
    let runs = options.is_some_and(|(options, _)| {
        tree.within(options)
            .any(|(_, entry)| entry.key == "defname" && entry.value == Value::Text("analyze"))
    });
    let Some(inner) = inner(tree, at) else { return Command::new("EXPLAIN", Class::Unknown) };
    // Whatever its value says: `ANALYZE off` is rare, and a write is not.
    let mut command = match runs {
        true => all_of("EXPLAIN", &inner.own_classes()),
        false => Command::new("EXPLAIN", Class::Read),
    };
    command.prepared = inner.prepared;
    command
}

fn transaction(tree: &Tree<'_>, at: usize) -> Command {
    let writes = || asks_to_write(tree, at);
    let (name, class) = match tree.text(at, "kind").unwrap_or_default() {
        "TRANS_STMT_BEGIN" | "TRANS_STMT_START" if writes() => ("BEGIN", Class::Unfence),
        "TRANS_STMT_BEGIN" | "TRANS_STMT_START" => ("BEGIN", Class::Begin),
        "TRANS_STMT_COMMIT" => ("COMMIT", Class::Commit),
        "TRANS_STMT_ROLLBACK" => ("ROLLBACK", Class::Rollback),
        "TRANS_STMT_SAVEPOINT" => ("SAVEPOINT", Class::Rollback),
        "TRANS_STMT_RELEASE" => ("RELEASE SAVEPOINT", Class::Rollback),
        "TRANS_STMT_ROLLBACK_TO" => ("ROLLBACK TO SAVEPOINT", Class::Rollback),
        "TRANS_STMT_PREPARE" => ("PREPARE TRANSACTION", Class::TwoPhase),
        "TRANS_STMT_COMMIT_PREPARED" => ("COMMIT PREPARED", Class::TwoPhase),
        "TRANS_STMT_ROLLBACK_PREPARED" => ("ROLLBACK PREPARED", Class::TwoPhase),
        _ => ("unknown", Class::Unknown),
    };
    Command::new(name, class)
}

/// One of its transaction modes is READ WRITE.
fn asks_to_write(tree: &Tree<'_>, at: usize) -> bool {
    let modes: Vec<usize> =
        tree.within(at).filter(|(_, entry)| entry.key == "DefElem").map(|(mode, _)| mode).collect();
    let is_write = |mode: &usize| {
        let name = tree.text(*mode, "defname").unwrap_or_default();
        // A constant without its value is zero.
        let is_on = || {
            tree.within(*mode)
                .any(|(_, entry)| entry.key == "ival" && matches!(entry.value, Value::Plain("1")))
        };
        READ_ONLY.contains(&name) && !is_on()
    };
    modes.iter().any(is_write)
}

fn variable(tree: &Tree<'_>, at: usize) -> Command {
    let name = unescaped(tree.text(at, "name").unwrap_or_default()).to_ascii_lowercase();
    let kind = tree.text(at, "kind").unwrap_or_default();
    let command = if kind.starts_with("VAR_RESET") { "RESET" } else { "SET" };
    let unfences = match kind {
        // `SET TRANSACTION ...` and `SET SESSION CHARACTERISTICS AS TRANSACTION ...`
        "VAR_SET_MULTI" => asks_to_write(tree, at),
        // Back to what the server says, which is fenced as well; within a transaction the value may be another.
        "VAR_RESET_ALL" => false,
        _ => READ_ONLY.contains(&name.as_str()) && !is_on(tree, at),
    };
    Command::new(command, if unfences { Class::Unfence } else { Class::Session })
}

/// Its value is a plain `on`, as the server reads booleans (`parse_bool`).
fn is_on(tree: &Tree<'_>, at: usize) -> bool {
    let Some((args, _)) = tree.field(at, "args") else { return false };
    let values: Vec<&str> = tree
        .within(args)
        .filter(|(_, entry)| matches!(entry.key, "sval" | "ival" | "boolval"))
        .filter_map(|(_, entry)| match entry.value {
            Value::Text(text) | Value::Plain(text) => Some(text),
            _ => None,
        })
        .collect();
    matches!(values.as_slice(), [one] if matches!(one.to_ascii_lowercase().as_str(), "on" | "true" | "yes" | "1"))
}

/// What it names, wherever it stands, without schemas: which one is meant hangs on types and path.
fn names(tree: &Tree<'_>, at: usize, command: &mut Command) {
    let last = |at: usize, key: &str| tree.strings(at, key).last().map(|name| unescaped(name));
    for (entry_at, entry) in tree.within(at) {
        match (entry.key, entry.value) {
            ("FuncCall", Value::Object) => command.functions.extend(last(entry_at, "funcname")),
            ("A_Expr", Value::Object) => {
                let name = last(entry_at, "name").unwrap_or_default();
                let written = BETWEEN.iter().find(|(one, _)| *one == name).map(|(_, both)| *both);
                command.operators.extend(written.into_iter().flatten().map(|one| one.to_string()));
                command.operators.insert(name);
            }
            ("SubLink", Value::Object) => {
                // Of IN the operator is not written.
                let compares = tree.field(entry_at, "testexpr").is_some();
                let operator = last(entry_at, "operName").or(compares.then(|| "=".into()));
                command.operators.extend(operator);
            }
            ("SortBy", Value::Object) => command.operators.extend(last(entry_at, "useOp")),
            ("CaseExpr", Value::Object) if tree.field(entry_at, "arg").is_some() => {
                command.operators.insert("=".into());
            }
            ("JoinExpr", Value::Object) => {
                let is_equal = |key| tree.field(entry_at, key).is_some();
                if is_equal("usingClause") || is_equal("isNatural") {
                    command.operators.insert("=".into());
                }
            }
            ("typeName" | "TypeName", Value::Object) => {
                command.types.extend(last(entry_at, "names"));
            }
            ("ColumnRef", Value::Object) => {
                command
                    .columns
                    .extend(tree.strings(entry_at, "fields").iter().map(|name| unescaped(name)));
            }
            ("A_Indirection", Value::Object) => {
                let names = tree.strings(entry_at, "indirection");
                command.columns.extend(names.iter().map(|name| unescaped(name)));
            }
            ("relname", Value::Text(name)) => {
                command.relations.insert(unescaped(name));
            }
            (node, Value::Object) => {
                let of_node = SYNTAX.iter().filter(|(one, _)| *one == node);
                command.syntax.extend(of_node.map(|(_, name)| (*name).to_owned()));
            }
            _ => (),
        }
    }
}

/// A text of the JSON without its escapes.
fn unescaped(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    let mut rest = text.chars();
    while let Some(char) = rest.next() {
        if char != '\\' {
            out.push(char);
            continue;
        }
        match rest.next() {
            Some('n') => out.push('\n'),
            Some('t') => out.push('\t'),
            Some('r') => out.push('\r'),
            Some('b') => out.push('\u{8}'),
            Some('f') => out.push('\u{c}'),
            Some('u') => {
                let code: String = rest.by_ref().take(4).collect();
                let code = u32::from_str_radix(&code, 16).ok().and_then(char::from_u32);
                out.push(code.unwrap_or('\u{fffd}'));
            }
            Some(other) => out.push(other),
            None => (),
        }
    }
    out
}
