package registry

import "strings"

// PatternOf returns the route that a request path is of, with names for what differs between its requests:
// /v2/<name>/blobs/<digest>, /v2/<name>/_ext/<resource>. It is empty for a path that is no route. Whoever decides by it
// decides about exactly what a Server does with the path.
func PatternOf(path string) string {
	p, below := strings.CutPrefix(path, "/v2")
	if !below || p != "" && p[0] != '/' {
		return ""
	}
	rt, ok := parseRoute(strings.TrimPrefix(p, "/"))
	if !ok {
		return ""
	}
	switch rt.kind {
	case "":
		return "/v2/"
	case "catalog":
		return "/v2/_catalog"
	case "extension":
		return extensionOf(rt).Pattern()
	}
	segments := "/v2/<name>/" + strings.Join(routeWords[rt.kind], "/")
	switch rt.kind {
	case "uploads":
		return segments + "/"
	case "upload":
		return segments + "/<session>"
	case "manifest":
		return segments + "/<reference>"
	case "blob", "referrers":
		return segments + "/<digest>"
	}
	return segments
}

// Pattern returns what PatternOf does for a path of the extension.
func (x ExtensionPath) Pattern() string {
	if x.Repository == "" {
		return "/v2/" + x.Extension + "/" + x.Resource
	}
	return "/v2/<name>/" + x.Extension + "/" + x.Resource
}
