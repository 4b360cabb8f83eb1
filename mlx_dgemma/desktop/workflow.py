"""A Quick Action as an Automator workflow: a bundle of two property lists.

Info.plist announces a service. Its keys are those of Apple's Services Implementation Guide,
https://developer.apple.com/library/archive/documentation/Cocoa/Conceptual/SysServices/Articles/properties.html, and of
https://developer.apple.com/documentation/bundleresources/information-property-list/nsservices. The types are Apple's,
https://developer.apple.com/documentation/uniformtypeidentifiers/system-declared-uniform-type-identifiers.
document.wflow is what Automator saves; Apple does not document it. Its keys are those that stored workflows share.
"""

from __future__ import annotations

import uuid
from typing import Any

from .. import __version__
from .actions import Action

MARK = "org.mlx-dgemma.quick-action."  # how the identifiers of this package's bundles begin
TEXT = "public.utf8-plain-text"
FILE_TYPES = {"pictures": "public.image", "files": "public.item"}
AUTOMATOR_TYPES = {
    "text": "com.apple.Automator.text",
    "pictures": "com.apple.Automator.fileSystemObject.image",
    "files": "com.apple.Automator.fileSystemObject",
    "nothing": "com.apple.Automator.nothing",
}
FINDER, FINDER_PATH = "com.apple.finder", "/System/Library/CoreServices/Finder.app"
TIMEOUT_MS = 600_000  # the first call loads the model
SHELL = "/bin/bash"
STDIN, ARGUMENTS = 0, 1  # how Run Shell Script gets its input
ACTION_PATH = "/System/Library/Automator/Run Shell Script.action"


def info_plist(action: Action) -> dict[str, Any]:
    """Info.plist of an action: where it is offered, and what it takes and returns."""
    service: dict[str, Any] = {
        "NSMenuItem": {"default": action.title},
        "NSMessage": "runWorkflowAsService",
        "NSTimeout": str(TIMEOUT_MS),
    }
    if action.input == "text":
        service |= {"NSRequiredContext": {}, "NSSendTypes": [TEXT]}
        if action.output == "replace":
            service["NSReturnTypes"] = [TEXT]
    else:
        service["NSRequiredContext"] = {"NSApplicationIdentifier": FINDER}
        service["NSSendFileTypes"] = [FILE_TYPES[action.input]]
    return {
        "CFBundleIdentifier": MARK + action.key,
        "CFBundleName": action.title,
        "CFBundleShortVersionString": __version__,
        "CFBundlePackageType": "BNDL",
        "NSServices": [service],
    }


def document(action: Action, script: str) -> dict[str, Any]:
    """document.wflow of an action: one action of Automator, Run Shell Script."""
    input_type = AUTOMATOR_TYPES[action.input]
    output_type = AUTOMATOR_TYPES["text" if action.output == "replace" else "nothing"]
    meta: dict[str, Any] = {
        "inputTypeIdentifier": input_type,
        "outputTypeIdentifier": output_type,
        "presentationMode": 15,
        "processesInput": False,
        "serviceInputTypeIdentifier": input_type,
        "serviceOutputTypeIdentifier": output_type,
        "serviceProcessesInput": False,
        "useAutomaticInputType": False,
        "workflowTypeIdentifier": "com.apple.Automator.servicesMenu",
    }
    if action.input != "text":
        meta |= {"serviceApplicationBundleID": FINDER, "serviceApplicationPath": FINDER_PATH}
    return {
        "AMApplicationBuild": "528",
        "AMApplicationVersion": "2.10",
        "AMDocumentVersion": "2",
        "actions": [{"action": _run_shell_script(action, script), "isViewVisible": 1}],
        "connectors": {},
        "workflowMetaData": meta,
    }


def _run_shell_script(action: Action, script: str) -> dict[str, Any]:
    strings = {"Container": "List", "Types": ["com.apple.cocoa.string"]}
    parameters = {
        "CheckedForUserDefaultShell": True,
        "COMMAND_STRING": script,
        "inputMethod": STDIN if action.input == "text" else ARGUMENTS,
        "shell": SHELL,
        "source": "",
    }
    names = {name: _identifier(action, name) for name in ("InputUUID", "OutputUUID", "UUID")}
    return {
        "ActionBundlePath": ACTION_PATH,
        "ActionName": "Run Shell Script",
        "ActionParameters": parameters,
        "AMAccepts": {**strings, "Optional": True},
        "AMActionVersion": "2.0.3",
        "AMApplication": ["Automator"],
        "AMParameterProperties": {name: {} for name in parameters},
        "AMProvides": strings,
        "arguments": {},
        "BundleIdentifier": "com.apple.RunShellScript",
        "CanShowSelectedItemsWhenRun": False,
        "CanShowWhenRun": True,
        "Category": ["AMCategoryUtilities"],
        "CFBundleVersion": "2.0.3",
        "Class Name": "RunShellScriptAction",
        "isViewVisible": 1,
        "Keywords": ["Shell", "Script", "Command", "Run", "Unix"],
        "nibPath": f"{ACTION_PATH}/Contents/Resources/Base.lproj/main.nib",
        "UnlocalizedApplications": ["Automator"],
        **names,
    }


def _identifier(action: Action, name: str) -> str:
    """The same for the same action, so that writing it again changes nothing."""
    return str(uuid.uuid5(uuid.NAMESPACE_DNS, f"{MARK}{action.key}.{name}")).upper()
