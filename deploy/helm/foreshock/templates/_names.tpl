{{- define "foreshock.name" -}}
{{- $name := contains .Chart.Name .Release.Name | ternary .Release.Name (printf "%s-%s" .Release.Name .Chart.Name) -}}
{{- $name | trunc 40 | trimSuffix "-" }}
{{- end }}

{{- define "foreshock.selector" -}}
app.kubernetes.io/name: {{ .Chart.Name }}
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end }}

{{- define "foreshock.labels" -}}
{{ include "foreshock.selector" . }}
app.kubernetes.io/component: collector
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
{{- end }}

{{- define "foreshock.scheme" -}}
{{ ternary "https" "http" (ne .Values.tls.secret "") }}
{{- end }}

{{- define "foreshock.publicUrl" -}}
{{- .Values.publicUrl | default (printf "%s://%s.%s:9327" (include "foreshock.scheme" .) (include "foreshock.name" .) .Release.Namespace) | trimSuffix "/" }}
{{- end }}
